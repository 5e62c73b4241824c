"""The package's own format: every option comes back, what is damaged is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import miniquant
import oracle
from format_layers import KINDS, random_layer, same
from miniquant.formats import LayerGrid, Native

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

FORM = Native()
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS: list[dict[str, Any]] = [
    {"bits": 2, "group_size": 7, "full_range": True},
    {"bits": 3, "group_size": -1, "symmetric": False, "ridge": 0.1},
    {"bits": 5, "group_size": 16, **miniquant.preset("best")},
    {"bits": 8, "group_size": 64, **miniquant.preset("fast", symmetric=False)},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_grid_comes_back(dtype: torch.dtype, bits: int, kind: str) -> None:
    for rows, columns, group_size in [(64, 96, 32), (5, 21, 8), (3, 50, -1), (1, 1, 1)]:
        quantized = random_layer(rows, columns, bits=bits, group_size=group_size, kind=kind, dtype=dtype)
        grid = LayerGrid.of(quantized)
        assert FORM.check("fc", grid) == []
        tensors = FORM.tensors("fc", quantized)
        grids = FORM.layers(FORM.config({"fc": grid}), {name: tensor.to("meta") for name, tensor in tensors.items()})
        assert grids == {"fc": grid}
        assert same(FORM.read("fc", tensors, grids["fc"]), quantized)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_comes_back_from_files(dtype: torch.dtype, tmp_path: Path) -> None:
    weight, hessian = oracle.layer(5, 20, 50, dtype=dtype)
    layers = {f"h.{i}.fc": miniquant.gptq(weight, hessian, **options) for i, options in enumerate(OPTIONS)}
    options = {f"h.{i}.fc": options for i, options in enumerate(OPTIONS)}
    config = FORM.config({name: LayerGrid.of(layer) for name, layer in layers.items()}, ["lm_head"], options)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {key: tensor for name, layer in layers.items() for key, tensor in FORM.tensors(name, layer).items()},
        tmp_path / "model.safetensors",
    )
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    assert FORM.options(config) == options
    assert config["ignored"] == ["lm_head"]
    for name, grid in FORM.layers(config, tensors).items():
        read = FORM.read(name, tensors, grid)
        assert isinstance(read, miniquant.GptqResult)
        assert oracle.same_bits(read, layers[name])
        assert (read.bits, read.group_size, read.symmetric, read.full_range) == (
            layers[name].bits,
            layers[name].group_size,
            layers[name].symmetric,
            layers[name].full_range,
        )


def test_tensors_are_what_the_documentation_says() -> None:
    quantized = random_layer(4, 20, bits=3, group_size=8, kind="asymmetric", dtype=torch.bfloat16)
    tensors = FORM.tensors("h.0.fc", quantized)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "h.0.fc.codes": (torch.uint8, (4, 8)),
        "h.0.fc.scales": (torch.bfloat16, (4, 3)),
        "h.0.fc.zero_points": (torch.int8, (4, 3)),
    }
    assert torch.equal(tensors["h.0.fc.codes"], miniquant.pack(quantized))


def test_scales_are_of_the_models_dtype() -> None:
    for dtype in DTYPES:
        assert FORM.scale_dtype(dtype) == dtype
    with pytest.raises(ValueError, match=r"miniquant: expected the model's dtype to be .*, but got torch.int8"):
        FORM.scale_dtype(torch.int8)


@pytest.mark.parametrize("options", [{"ridge": float("nan")}, {"scales": torch.ones(1)}, {"pair": (1, 2)}, {1: 2}])
def test_options_that_json_would_not_give_back(options: dict[Any, Any]) -> None:
    grid = LayerGrid.of(random_layer(4, 32))
    with pytest.raises(
        (TypeError, ValueError), match=r"^miniquant: expected options of layer 'fc' to be values that JSON can hold"
    ):
        FORM.config({"fc": grid}, options={"fc": options})
    with pytest.raises(ValueError, match="expected options of quantized layers, but got those of 'head'"):
        FORM.config({"fc": grid}, options={"head": {}})


def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the only layer's entry."""
    return lambda config: config["layers"]["fc"].update(changes)


BROKEN: list[tuple[Callable[[dict[str, Any], dict[str, Tensor]], object], str]] = [
    (lambda c, _: c.update(quant_method="gptq"), "quant_method of quantization_config to be 'miniquant'"),
    (lambda c, _: c.update(version=2), "version of quantization_config to be 1, but got 2"),
    (lambda c, _: c.pop("version"), "version of quantization_config to be 1, but got None"),
    (lambda c, _: c.pop("layers"), "layers of quantization_config to be an object, but got None"),
    (lambda c, _: c.update(layers={"fc": 4}), "layers['fc'] of quantization_config to be an object, but got 4"),
    (lambda c, _: entry(shape=[8])(c), "layers['fc'].shape of quantization_config to be two integers, but got [8]"),
    (lambda c, _: entry(shape=[8, "64"])(c), "columns to be positive, but got '64'"),
    (lambda c, _: entry(shape=[8, 60])(c), "tensor 'fc.codes' to have shape [8, 30], but got shape [8, 32]"),
    (lambda c, _: entry(shape=[9, 64])(c), "tensor 'fc.codes' to have shape [9, 32], but got shape [8, 32]"),
    (lambda c, _: entry(bits=9)(c), "bits to be 2 to 8, but got 9"),
    (lambda c, _: entry(bits=3)(c), "tensor 'fc.codes' to have shape [8, 24], but got shape [8, 32]"),
    (lambda c, _: entry(group_size=0)(c), "group_size to be positive, or -1 for one group per row, but got 0"),
    (lambda c, _: entry(group_size=16)(c), "tensor 'fc.scales' to have shape [8, 4], but got shape [8, 2]"),
    (lambda c, _: entry(symmetric="no")(c), "symmetric to be True or False, but got 'no'"),
    (lambda c, _: entry(symmetric=True)(c), "no tensor 'fc.zero_points' where symmetric is True"),
    (lambda c, _: entry(full_range=True)(c), "full_range to be False where symmetric is False, but got True"),
    (lambda c, _: entry(scale_dtype="int8")(c), "scale_dtype of quantization_config to be one of float32, float64"),
    (lambda c, _: entry(scale_dtype=["float16"])(c), "but got ['float16']"),
    (lambda c, _: entry(scale_dtype="float16")(c), "tensor 'fc.scales' to be float16, but got float32"),
    (lambda _, t: t.pop("fc.codes"), "a tensor 'fc.codes' of layer 'fc', but got none of that name"),
    (lambda _, t: t.pop("fc.scales"), "a tensor 'fc.scales' of layer 'fc', but got none of that name"),
    (lambda _, t: t.pop("fc.zero_points"), "a tensor 'fc.zero_points' of layer 'fc', but got none of that name"),
    (lambda _, t: t.update({"fc.codes": torch.zeros(8, 64)}), "tensor 'fc.codes' to be uint8, but got float32"),
    (
        lambda _, t: t.update({"fc.row_loss": torch.zeros(3)}),
        "tensor 'fc.row_loss' to have shape [8], but got shape [3]",
    ),
    (lambda _, t: t["fc.scales"].fill_(torch.nan), "scales of layer 'fc' to be finite, but got nan"),
    (
        lambda _, t: t["fc.zero_points"].fill_(9),
        "zero_points of layer 'fc' to be in [-8, 7] for 4 bits, but got 9 to 9",
    ),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[text[:50] for _, text in BROKEN])
def test_damaged_checkpoints(change: Callable[[dict[str, Any], dict[str, Tensor]], object], message: str) -> None:
    quantized = random_layer(8, 64, kind="asymmetric", dtype=torch.float32)
    tensors, config = FORM.tensors("fc", quantized), FORM.config({"fc": LayerGrid.of(quantized)})
    assert same(FORM.read("fc", tensors, FORM.layers(config, tensors)["fc"]), quantized), "unchanged it is read"
    change(config, tensors)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
        FORM.read("fc", tensors, FORM.layers(config, tensors)["fc"])
    assert str(caught.value).startswith("miniquant: ")
    assert message in str(caught.value)
