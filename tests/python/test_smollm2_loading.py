"""SmolLM2-135M back from a quantized folder: what the kernel's products are worth, and that it speaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from test_smollm2 import windows

transformers = pytest.importorskip("transformers")

from miniquant.linear import KERNEL_TOKENS, QuantizedLinear  # noqa: E402  (needs transformers)
from miniquant.loading import load  # noqa: E402
from quantized_folders import quantized_folder  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.nightly


def log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """[windows * tokens, vocabulary] of windows that the kernel takes, one at a time."""
    with torch.no_grad():
        return torch.cat([functional.log_softmax(model(rows[None]).logits[0].float(), -1) for rows in tokens])


def divergence(reference: Tensor, other: Tensor) -> float:
    """The mean KL divergence per token."""
    return float((reference.exp() * (reference - other)).sum(-1).mean())


@pytest.mark.parametrize("symmetric", [True, False])
def test_smollm2_from_a_folder(symmetric: bool, smollm2_folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    used: set[str] = set()
    tokens = windows(tokenizer, 1, 4, used).view(-1, KERNEL_TOKENS)
    grid = {"bits": 4, "group_size": 64, "symmetric": symmetric}
    made = quantized_folder(model, tmp_path, options=lambda _: grid)
    exact = load(made.folder, dtype=torch.float32)
    assert sum(isinstance(module, QuantizedLinear) for module in exact.modules()) == 210
    reference = log_probabilities(made.reference(), tokens)
    assert float((log_probabilities(exact, tokens) - reference).abs().max()) <= 2e-3
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(exact.generate(prompt, **options), made.reference().generate(prompt, **options))
    # The kernel rounds scales and zero points to bfloat16; a float model in bfloat16 rounds every weight.
    fast = load(made.folder, dtype=torch.bfloat16)
    plain = divergence(reference, log_probabilities(made.reference(torch.bfloat16), tokens))
    ours = divergence(reference, log_probabilities(fast, tokens))
    print(f"KL divergence from float32: float weights in bfloat16 {plain:.2e}, QuantizedLinear {ours:.2e}")
    assert ours <= 1.5 * plain
    assert "Paris" in tokenizer.decode(fast.generate(prompt, **options)[0])
