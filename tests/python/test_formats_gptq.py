"""The GPTQ checkpoint format, against a reader written from the published layout alone."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch

import miniquant
from format_layers import KINDS, as_read, random_layer, same
from miniquant.formats import Gptq, LayerGrid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

FORMS = {"gptq": Gptq(version=1), "gptq_v2": Gptq(version=2)}
SHAPES = [(32, 64, 32), (96, 32, 16), (64, 96, -1), (32, 128, 128)]  # rows, columns, group_size
BITS = (2, 3, 4, 8)


def integers(words: Tensor, bits: int) -> np.ndarray[Any, Any]:
    """Unsigned integers of ``bits`` bits from columns of words, the lowest bit first: [words, n] to [integers, n].

    The published layouts, one by one: 2, 4 and 8 bits put 16, 8 and 4 integers into a word; 3 bits put 32 into three
    words, of which the eleventh and the twenty-second cross from one word to the next.
    """
    unsigned = words.numpy().astype(np.int64) & 0xFFFFFFFF
    out = []
    if bits != 3:
        for word in unsigned:
            out += [(word >> (bits * place)) & (2**bits - 1) for place in range(32 // bits)]
        return np.stack(out)
    for first, second, third in zip(unsigned[::3], unsigned[1::3], unsigned[2::3], strict=True):
        out += [(first >> (3 * place)) & 7 for place in range(10)]
        out.append(((first >> 30) & 3) | ((second & 1) << 2))
        out += [(second >> (3 * place + 1)) & 7 for place in range(10)]
        out.append(((second >> 31) & 1) | ((third & 3) << 1))
        out += [(third >> (3 * place + 2)) & 7 for place in range(10)]
    return np.stack(out)


def published_weight(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """W [N, K] in float64 as readers compute it: scale of the column's group times (integer - zero)."""
    bits = config["bits"]
    codes = integers(tensors[f"{name}.qweight"], bits)  # [K, N]
    zeros = integers(tensors[f"{name}.qzeros"].t(), bits).T  # [G, N]
    if config["checkpoint_format"] == "gptq":
        zeros = zeros + 1
    groups = tensors[f"{name}.g_idx"].numpy()
    scales = tensors[f"{name}.scales"].numpy().astype(np.float64)
    weight: np.ndarray[Any, Any] = (scales[groups] * (codes - zeros[groups])).T
    return weight


def layer(bits: int, shape: tuple[int, int, int], kind: str, label: str) -> miniquant.QuantizedWeight:
    """A random layer that the version of a label can hold."""
    rows, columns, group_size = shape
    return random_layer(rows, columns, bits=bits, group_size=group_size, kind=kind, lowest_zero=label == "gptq_v2")


@pytest.mark.parametrize("label", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_reader_of_the_published_layout_gets_the_weight(
    shape: tuple[int, int, int], bits: int, kind: str, label: str
) -> None:
    quantized = layer(bits, shape, kind, label)
    form = FORMS[label]
    tensors = form.tensors("h.0.fc", quantized)
    config = json.loads(json.dumps(form.config({"h.0.fc": LayerGrid.of(quantized)})))
    expected = miniquant.dequantize(quantized, dtype=torch.float32).double().numpy()
    assert config["checkpoint_format"] == label
    assert np.array_equal(published_weight("h.0.fc", tensors, config), expected)
    rows, columns, _ = shape
    groups = LayerGrid.of(quantized).groups
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "h.0.fc.qweight": (torch.int32, (columns * bits // 32, rows)),
        "h.0.fc.qzeros": (torch.int32, (groups, rows * bits // 32)),
        "h.0.fc.scales": (torch.float16, (groups, rows)),
        "h.0.fc.g_idx": (torch.int32, (columns,)),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("label", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_comes_back(shape: tuple[int, int, int], bits: int, kind: str, label: str) -> None:
    quantized, form = layer(bits, shape, kind, label), FORMS[label]
    tensors = form.tensors("fc", quantized)
    config = form.config({"fc": LayerGrid.of(quantized)})
    grids = form.layers(config, {name: tensor.to("meta") for name, tensor in tensors.items()})
    assert same(form.read("fc", tensors, grids["fc"]), as_read(quantized))


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_zero_points_that_every_reader_knows(bits: int, word: int) -> None:
    quantized = layer(bits, SHAPES[0], "symmetric", "gptq")
    assert set(FORMS["gptq"].tensors("fc", quantized)["fc.qzeros"].flatten().tolist()) == {word}
    plus_one = sum(1 << (bits * place) for place in range(32 // bits))
    expected = (word + plus_one) - (1 << 32 if word + plus_one >= 1 << 31 else 0)
    assert set(FORMS["gptq_v2"].tensors("fc", quantized)["fc.qzeros"].flatten().tolist()) == {expected}


@pytest.mark.parametrize("bits", BITS)
def test_version_1_has_no_place_for_the_lowest_zero_point(bits: int) -> None:
    quantized = layer(bits, SHAPES[0], "asymmetric", "gptq_v2")
    message = f"gptq: expected zero_points of layer 'fc' to be above {-(2 ** (bits - 1))}, .* (choose gptq_v2)"
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        FORMS["gptq"].tensors("fc", quantized)
    (warning,) = FORMS["gptq"].check("fc", LayerGrid.of(quantized))
    assert "choose gptq_v2" in warning
    assert FORMS["gptq_v2"].check("fc", LayerGrid.of(quantized)) == []


def test_scales_are_float16() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert FORMS["gptq"].scale_dtype(dtype) == torch.float16
    with pytest.raises(ValueError, match=r"gptq: expected the model's dtype to be .*, but got torch.int8"):
        FORMS["gptq"].scale_dtype(torch.int8)
    with pytest.raises(ValueError, match="Gptq: expected version to be 1 or 2, but got 3"):
        Gptq(version=3)  # type: ignore[arg-type]


GRID = LayerGrid(64, 96, 4, 32, symmetric=True, full_range=False, scale_dtype=torch.float16)


def grid(**changes: Any) -> LayerGrid:
    """A grid that the format holds without a warning, changed."""
    return LayerGrid(**{**vars(GRID), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits of layer 'h.0.fc' to be 2, 3, 4 or 8, but got 5"),
        ({"scale_dtype": torch.float32}, "scales of layer 'h.0.fc' to be float16, but got float32"),
        ({"group_size": 64}, "group_size of layer 'h.0.fc' to divide its 96 columns, but got 64"),
        ({"rows": 60, "bits": 2}, "rows of layer 'h.0.fc' to be a multiple of 16 for 2 bits, but got 60"),
        ({"rows": 48, "bits": 3}, "rows of layer 'h.0.fc' to be a multiple of 32 for 3 bits, but got 48"),
        ({"columns": 100, "group_size": -1}, "columns of layer 'h.0.fc' to be a multiple of 8 for 4 bits, but got 100"),
        ({"rows": 62, "bits": 8}, "rows of layer 'h.0.fc' to be a multiple of 4 for 8 bits, but got 62"),
    ],
)
@pytest.mark.parametrize("label", FORMS)
def test_layers_that_it_does_not_hold(label: str, changes: dict[str, Any], message: str) -> None:
    form = FORMS[label]
    for call in (lambda: form.check("h.0.fc", grid(**changes)), lambda: form.config({"h.0.fc": grid(**changes)})):
        with pytest.raises(ValueError, match=f"^{label}: expected {re.escape(message)} \\("):
            call()


def test_scales_of_another_dtype_are_not_rounded() -> None:
    quantized = random_layer(32, 64, dtype=torch.float32)
    with pytest.raises(ValueError, match="expected scales of layer 'fc' to be float16, but got float32"):
        FORMS["gptq"].tensors("fc", quantized)


def test_warning_of_kernels() -> None:
    (warning,) = FORMS["gptq"].check("fc", grid(rows=40))
    assert warning.startswith("gptq: layer 'fc': ")
    assert "multiples of 32, but it has 40 rows" in warning
    assert FORMS["gptq"].check("fc", GRID) == []


@pytest.mark.parametrize("label", FORMS)
def test_configuration_of_layers_that_are_alike(label: str) -> None:
    layers = {"h.0.fc": GRID, "h.1.fc": grid(rows=32)}
    config = FORMS[label].config(layers, ["lm_head"])
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": label,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"miniquant:{miniquant.__version__}"]},
    }
    assert FORMS[label].files(layers, ["lm_head"]) == {"quantize_config.json": config}
    assert FORMS[label].config({**layers, "lm_head": GRID})["lm_head"] is True


def published_kind(config: Mapping[str, Any], name: str) -> tuple[Any, ...] | None:
    """What GPTQModel and vLLM take for a layer: the first entry of ``dynamic`` that matches counts."""
    entries: dict[str, Any] = {}
    for key, values in config.get("dynamic", {}).items():
        if re.match(key[2:], name):
            if key.startswith("-:"):
                return None
            entries = values
            break
    return tuple(entries.get(key, config[key]) for key in ("bits", "group_size", "sym"))


def test_configuration_of_layers_that_differ() -> None:
    form = FORMS["gptq_v2"]
    layers = {f"h.{block}.{part}": GRID for block in range(4) for part in ("q", "k", "up")}
    layers |= {f"h.{block}.down": grid(bits=8, group_size=-1) for block in range(4)}
    layers |= {"h.0.q": grid(bits=8, group_size=-1), "h.3.up": grid(symmetric=False)}
    ignored = ["lm_head", "h.2.k", *(f"h.{block}.gate" for block in range(4))]
    del layers["h.2.k"]
    config = json.loads(json.dumps(form.config(layers, ignored)))
    assert list(config["dynamic"]) == [
        r"-:^h\.2\.k$",
        r"-:^h\.\d+\.gate$",
        r"+:^h\.0\.q$",
        r"+:^h\.\d+\.down$",
        r"+:^h\.3\.up$",
    ]
    for name, wanted in layers.items():
        assert published_kind(config, name) == (wanted.bits, wanted.group_size, wanted.symmetric)
    for name in ignored[1:]:
        assert published_kind(config, name) is None
    quantized = {
        name: random_layer(
            g.rows, g.columns, bits=g.bits, group_size=g.group_size, kind="full range" if g.symmetric else "asymmetric"
        )
        for name, g in layers.items()
    }
    tensors = {key: t for name, weight in quantized.items() for key, t in form.tensors(name, weight).items()}
    grids = form.layers(config, tensors)
    assert set(grids) == set(layers)
    assert all(same(form.read(name, tensors, grids[name]), weight) for name, weight in quantized.items())


BROKEN_CONFIGS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda c: c.update(quant_method="awq"), "quant_method of quantization_config to be 'gptq', but got 'awq'"),
    (lambda c: c.update(checkpoint_format="gptq_v2"), "checkpoint_format of quantization_config to be 'gptq', but"),
    (lambda c: c.update(pack_dtype="int16"), "pack_dtype of quantization_config to be 'int32', but got 'int16'"),
    (lambda c: c.update(desc_act=True), "desc_act of quantization_config to be false, but got True"),
    (lambda c: c.pop("bits"), "bits of quantization_config to be 2, 3, 4 or 8, but got None"),
    (lambda c: c.update(bits=5), "bits of quantization_config to be 2, 3, 4 or 8, but got 5"),
    (lambda c: c.update(bits=4.0), "bits of quantization_config to be 2, 3, 4 or 8, but got 4.0"),
    (lambda c: c.update(bits=8), "tensor 'h.0.fc.g_idx' to have shape [32], but got shape [64]"),
    (lambda c: c.update(group_size=0), "group_size of quantization_config to be positive or -1, but got 0"),
    (lambda c: c.update(group_size=64), "tensor 'h.0.fc.scales' to have shape [1, 32], but got shape [2, 32]"),
    (lambda c: c.update(sym="no"), "sym of quantization_config to be true or false, but got 'no'"),
    (lambda c: c.update(dynamic=[]), "dynamic of quantization_config to be an object, but got []"),
    (lambda c: c.update(dynamic={"+:h": 4}), "dynamic['+:h'] of quantization_config to be an object, but got 4"),
    (lambda c: c.update(dynamic={"+:h(": {}}), "keys of dynamic of quantization_config to be regular expressions"),
    (lambda c: c.update(dynamic={"-:h.*": {}}), "dynamic of quantization_config to leave out no packed layer, but got"),
    (lambda c: c.update(dynamic={"h.*": {"bits": 7}}), "dynamic['h.*'].bits of quantization_config to be 2, 3, 4 or 8"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN_CONFIGS, ids=[text[:50] for _, text in BROKEN_CONFIGS])
def test_damaged_configurations(change: Callable[[dict[str, Any]], object], message: str) -> None:
    form, quantized = FORMS["gptq"], random_layer(32, 64)
    tensors = form.tensors("h.0.fc", quantized)
    config = form.config({"h.0.fc": LayerGrid.of(quantized)})
    assert form.layers(config, tensors), "unchanged it is read"
    change(config)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
        form.layers(config, tensors)
    assert str(caught.value).startswith("gptq: expected ")
    assert message in str(caught.value)


def test_a_missing_label_is_version_1() -> None:
    quantized = random_layer(32, 64)
    tensors = FORMS["gptq"].tensors("fc", quantized)
    config = FORMS["gptq"].config({"fc": LayerGrid.of(quantized)})
    del config["checkpoint_format"]
    assert FORMS["gptq"].layers(config, tensors)
    with pytest.raises(ValueError, match="checkpoint_format of quantization_config to be 'gptq_v2', but got 'gptq'"):
        FORMS["gptq_v2"].layers(config, tensors)


def int32(*shape: int) -> Tensor:
    """Zeros."""
    return torch.zeros(shape, dtype=torch.int32)


BROKEN_TENSORS: list[tuple[dict[str, Any], str]] = [
    ({"qzeros": None}, "a tensor 'fc.qzeros' of layer 'fc', but got none of that name"),
    ({"scales": None}, "a tensor 'fc.scales' of layer 'fc', but got none of that name"),
    ({"g_idx": None}, "a tensor 'fc.g_idx' of layer 'fc', but got none of that name"),
    ({"qweight": torch.zeros(8, 32)}, "tensor 'fc.qweight' to be int32, but got float32"),
    ({"qweight": int32(8)}, "tensor 'fc.qweight' to be a matrix, but got shape [8]"),
    ({"qweight": int32(8, 30)}, "tensor 'fc.scales' to have shape [2, 30]"),
    ({"qweight": int32(0, 32)}, "columns to be positive, but got 0"),
    ({"qzeros": int32(2, 5)}, "tensor 'fc.qzeros' to have shape [2, 4], but got shape [2, 5]"),
    ({"scales": torch.ones(2, 32)}, "tensor 'fc.scales' to be float16, but got float32"),
    ({"scales": torch.full((2, 32), torch.inf, dtype=torch.float16)}, "scales of layer 'fc' to be finite, but got inf"),
    ({"g_idx": int32(63)}, "tensor 'fc.g_idx' to have shape [64], but got shape [63]"),
    ({"g_idx": int32(64)}, "tensor 'fc.g_idx' to be the groups of columns in their order, but got another order"),
    ({"qzeros": int32(2, 4)}, "zero points of layer 'fc' to be 8 where sym is true, but got 1"),
    ({"qzeros": int32(2, 4) - 1}, "tensor 'fc.qzeros' to be below 15, to which readers add 1, but got it"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN_TENSORS, ids=[text[:60] for _, text in BROKEN_TENSORS])
def test_damaged_tensors(changes: dict[str, Any], message: str) -> None:
    form, quantized = FORMS["gptq"], random_layer(32, 64)
    tensors = form.tensors("fc", quantized)
    config = form.config({"fc": LayerGrid.of(quantized)})
    for name, tensor in changes.items():
        tensors.pop(f"fc.{name}")
        if tensor is not None:
            tensors[f"fc.{name}"] = tensor
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
        form.read("fc", tensors, form.layers(config, tensors)["fc"])
    assert str(caught.value).startswith("gptq: ")
    assert message in str(caught.value)
    assert "'fc" in str(caught.value)


@pytest.mark.parametrize(("written", "claimed"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
@pytest.mark.parametrize("bits", BITS)
def test_a_label_that_is_not_true_is_found_out(
    bits: int, written: Literal["gptq", "gptq_v2"], claimed: Literal["gptq", "gptq_v2"]
) -> None:
    """Of a symmetric layer the zero points are known, so that a wrong label cannot pass."""
    quantized = layer(bits, SHAPES[0], "symmetric", written)
    tensors = FORMS[written].tensors("fc", quantized)
    config = {**FORMS[written].config({"fc": LayerGrid.of(quantized)}), "checkpoint_format": claimed}
    grids = FORMS[claimed].layers(config, tensors)
    with pytest.raises(ValueError, match=f"is the label '{claimed}' true|be below"):
        FORMS[claimed].read("fc", tensors, grids["fc"])
