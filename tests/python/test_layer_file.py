"""Layer files: a written layer is read back unchanged, and anything else is rejected."""

from __future__ import annotations

import dataclasses
import stat
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import miniquant
import oracle

if TYPE_CHECKING:
    from pathlib import Path

LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {}),
    ("rtn", {"bits": 8, "group_size": -1, "symmetric": False}),
    ("gptq", {"bits": 2, "group_size": 7, "full_range": True}),
    ("gptq", {"bits": 3, "ridge": 0.1, **miniquant.preset("best")}),
]


def quantized_by(op: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> miniquant.QuantizedWeight:
    weight, hessian = oracle.layer(5, 20, 50, dtype=dtype)
    return miniquant.rtn(weight, **options) if op == "rtn" else miniquant.gptq(weight, hessian, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "options"), LAYERS)
def test_what_is_saved_comes_back(op: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    quantized = quantized_by(op, options, dtype)
    miniquant.save_layer(tmp_path / "layer.safetensors", quantized, layer="h.0.fc1", options=options)
    saved = miniquant.load_layer(str(tmp_path / "layer.safetensors"))
    assert type(saved.quantized) is type(quantized)
    assert oracle.same_bits(saved.quantized, quantized)
    for name in ("bits", "group_size", "symmetric", "full_range"):
        assert getattr(saved.quantized, name) == getattr(quantized, name)
    assert (saved.layer, saved.options) == ("h.0.fc1", options)
    assert torch.equal(miniquant.dequantize(saved.quantized), miniquant.dequantize(quantized))


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (3, 0), (1, 1)])
def test_small_layers(rows: int, columns: int, tmp_path: Path) -> None:
    quantized = miniquant.rtn(torch.ones(rows, columns))
    miniquant.save_layer(tmp_path / "layer.safetensors", quantized)
    assert oracle.same_bits(miniquant.load_layer(tmp_path / "layer.safetensors").quantized, quantized)


def test_strided_tensors_and_those_of_a_graph_are_saved(tmp_path: Path) -> None:
    quantized = quantized_by("rtn", {})
    scales = quantized.scales.t().contiguous().t().requires_grad_()
    strided = dataclasses.replace(quantized, codes=quantized.codes.t().contiguous().t(), scales=scales)
    miniquant.save_layer(tmp_path / "layer.safetensors", strided)
    assert oracle.same_bits(miniquant.load_layer(tmp_path / "layer.safetensors").quantized, quantized)


def test_a_file_is_replaced_whole_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    path.write_text("old")
    path.unlink()
    (tmp_path / "plain").touch()
    miniquant.save_layer(path, quantized_by("rtn", {}))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    first = path.read_bytes()
    with pytest.raises(ValueError, match=r"save_layer: expected bits of quantized to be 2 to 8, but got 9"):
        miniquant.save_layer(path, dataclasses.replace(quantized_by("rtn", {}), bits=9))
    assert path.read_bytes() == first
    miniquant.save_layer(path, quantized_by("rtn", {"bits": 3}))
    assert miniquant.load_layer(path).quantized.bits == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["layer.safetensors", "plain"]


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    path, quantized = tmp_path / "layer.safetensors", quantized_by("rtn", {})
    with pytest.raises(TypeError, match="save_layer: expected quantized to be a QuantizedWeight, but got Tensor"):
        miniquant.save_layer(path, quantized.codes)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"save_layer: expected options to be values that JSON can hold, but got .*Tensor"
    ):
        miniquant.save_layer(path, quantized, options={"scales": quantized.scales})
    with pytest.raises(ValueError, match="save_layer: expected options to be values that JSON can hold"):
        miniquant.save_layer(path, quantized, options={"ridge": float("nan")})
    with pytest.raises(FileNotFoundError):
        miniquant.save_layer(tmp_path / "missing" / "layer.safetensors", quantized)
    assert not list(tmp_path.iterdir())


ENTRY = "expected metadata {!r} to be {}, but got {}".format
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"format": "pt"}, ENTRY("format", "miniquant.layer", "'pt'")),
    ({"format": None}, ENTRY("format", "miniquant.layer", "None")),
    ({"version": "2"}, ENTRY("version", "1", "'2'")),
    ({"bits": "four"}, ENTRY("bits", "an integer", "'four'")),
    ({"bits": None}, ENTRY("bits", "an integer", "''")),
    ({"bits": "9"}, "expected bits of the file to be 2 to 8, but got 9"),
    ({"group_size": "0"}, "expected group_size of the file to be positive, or -1 for one group per row, but got 0"),
    ({"group_size": "8"}, "expected scales of the file to have shape [5, 3], but got shape [5, 1]"),
    ({"symmetric": "True"}, ENTRY("symmetric", "true or false", "'True'")),
    ({"symmetric": "false", "full_range": "true"}, "expected full_range of the file to be False"),
    ({"bits": "3"}, "expected codes of the file to be in [-3, 3] for 3 bits, but got -7 to 7"),
    ({"options": "[]"}, ENTRY("options", "a JSON object", "'[]'")),
    ({"options": "{"}, ENTRY("options", "a JSON object", "'{'")),
    ({"codes": None}, "expected a tensor 'codes', but got none of that name"),
    ({"codes": torch.zeros(5, 20)}, "expected codes of the file to be int8, but got float32"),
    (
        {"codes": torch.zeros(5, dtype=torch.int8)},
        "expected codes of the file to be a matrix [N, K], but got shape [5]",
    ),
    ({"zero_points": torch.ones(5, 1, dtype=torch.int8)}, "expected zero_points of the file to be 0 where symmetric"),
    ({"row_loss": torch.zeros(4)}, "expected row_loss of the file to have shape [5], but got shape [4]"),
    ({"scales": torch.ones(5, 1, dtype=torch.int32)}, "expected scales of the file to be float32 or float64 or"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN, ids=[message[9:40] for _, message in BROKEN])
def test_what_is_no_layer_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    quantized = quantized_by("rtn", {})
    tensors: dict[str, Any] = dict(zip(("codes", "scales", "zero_points"), quantized.tensors, strict=True))
    metadata: dict[str, Any] = {
        "format": "miniquant.layer",
        "version": "1",
        "bits": "4",
        "group_size": "64",
        "symmetric": "true",
        "full_range": "false",
        "layer": "",
        "options": "{}",
    }
    save_file(tensors, path, metadata=metadata)
    assert oracle.same_bits(miniquant.load_layer(path).quantized, quantized), "unchanged it is read"
    for name, value in changes.items():
        owner = tensors if name in {*tensors, "row_loss"} else metadata
        owner[name] = value
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(present, path, metadata={name: text for name, text in metadata.items() if text is not None})
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
        miniquant.load_layer(path)
    assert str(caught.value).startswith(f"load_layer: {path}: {message}")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        miniquant.load_layer(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("no safetensors file")
    with pytest.raises(ValueError, match=r"load_layer: .*text: expected a safetensors file, but got: "):
        miniquant.load_layer(tmp_path / "text")


def test_the_file_holds_what_the_documentation_says(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    miniquant.save_layer(path, quantized_by("gptq", {}))
    tensors = load_file(path)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "codes": (torch.int8, (5, 20)),
        "scales": (torch.float32, (5, 1)),
        "zero_points": (torch.int8, (5, 1)),
        "row_loss": (torch.float32, (5,)),
    }
