"""SmolLM2-135M from its folder to the files of every format, and back through the readers of each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from torch import Tensor

from miniquant import FolderResult, GgufOptions, LayerOptions, convert_folder, dequantize, quantize_folder
from miniquant.checkpoint import Checkpoint
from miniquant.formats import format_of
from miniquant.formats.gguf_file import GGUF_FILE

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.nightly

OPTIONS: dict[str, Any] = {"tokens": 4096, "sequence_length": 256, "dtype": torch.float32}
RECIPE = LayerOptions(bits=4, group_size=64, preset="fast")


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights that the codes of a folder mean."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config["quantization_config"]
    form = format_of(config)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    grids = form.layers(config, tensors)
    return {name: dequantize(form.read(name, tensors, grid), dtype=torch.float32) for name, grid in grids.items()}


def logits(model: Any) -> Tensor:
    tokens = torch.arange(64)[None] * 701 % 49152
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def float_model_with(folder: Path, values: dict[str, Tensor]) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, value in values.items():
        model.get_submodule(name).weight.data = value
    return model.eval()


def test_compressed_tensors(smollm2_folder: Path, tmp_path: Path) -> None:
    """transformers and compressed-tensors give our own model's logits; Linears take at most 0.15 of float32."""
    result: FolderResult = quantize_folder(smollm2_folder, tmp_path / "out", RECIPE, **OPTIONS)
    assert len(result.result.layers) == 210
    out = Checkpoint(tmp_path / "out")
    linear = sum(out.tensors[name].nbytes for name in out.tensors if ".weight_" in name)
    before = sum(layer.site.rows * layer.site.columns * 4 for layer in result.result.layers.values())
    assert linear <= 0.15 * before
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (smollm2_folder / name).read_bytes()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = logits(float_model_with(smollm2_folder, weights(tmp_path / "out")))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-3)
    print(f"Linear weights: {linear / before:.4f} of float32; {result.result.seconds}")


def test_gptq_and_what_it_is_converted_to(smollm2_folder: Path, tmp_path: Path) -> None:
    quantize_folder(smollm2_folder, tmp_path / "gptq", RECIPE, format="gptq", **OPTIONS)
    expected = weights(tmp_path / "gptq")
    for form in ("gptq_v2", "miniquant", "compressed-tensors"):
        convert_folder(tmp_path / "gptq", tmp_path / form, form)
        found = weights(tmp_path / form)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gguf(smollm2_folder: Path, tmp_path: Path) -> None:
    """transformers reads the file as the float model with the values of the codes."""
    gguf = GgufOptions(other="F32")
    quantize_folder(smollm2_folder, tmp_path / "out", RECIPE, format="gguf", gguf=gguf, **OPTIONS)
    # The same codes: scales in float16.
    quantize_folder(smollm2_folder, tmp_path / "gptq", RECIPE, format="gptq", **OPTIONS)
    read: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=GGUF_FILE, dtype=torch.float32
    )
    expected = weights(tmp_path / "gptq")
    for name, value in expected.items():
        assert torch.equal(read.get_submodule(name).weight, value), name
    torch.testing.assert_close(logits(read), logits(float_model_with(smollm2_folder, expected)), rtol=1e-4, atol=1e-3)
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert read.config.vocab_size == config["vocab_size"]
