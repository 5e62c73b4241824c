"""GGUF's blocks, against the package gguf: it reads our weights, and we read what it wrote."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch

import miniquant
from format_layers import KINDS, random_layer, same
from miniquant.formats import Gguf, LayerGrid, layer_format
from miniquant.formats.gguf_blocks import COLUMNS, TYPES, BlockType

SHAPES = [(3, 64, 32), (5, 128, 64), (2, 96, -1), (4, 96, 64), (1, 32, 32)]  # rows, columns, group_size


def package_type(kind: BlockType) -> gguf.GGMLQuantizationType:
    """The package's own name of a type."""
    return gguf.GGMLQuantizationType[kind.name]


def package_values(blocks: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """What the package reads."""
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), package_type(kind)))


def exact_values(quantized: miniquant.QuantizedWeight) -> torch.Tensor:
    """(code - zero point) * scale, which float32 holds: 11 bits of a scale times at most 8 of an integer."""
    return miniquant.dequantize(quantized, dtype=torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_the_package_reads_equal_weights(kind: str, bits: int, shape: tuple[int, int, int]) -> None:
    rows, columns, group_size = shape
    quantized = random_layer(rows, columns, bits=bits, group_size=group_size, kind=kind)
    if kind == "asymmetric" and bits == 8:
        return
    blocks, block_type = Gguf(exact=True).blocks("fc", quantized)
    assert (blocks.dtype, tuple(blocks.shape)) == (torch.uint8, (rows, columns // 32 * block_type.nbytes))
    assert torch.equal(package_values(blocks, block_type), exact_values(quantized))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 5])
def test_a_rounded_minimum_moves_weights_by_less_than_it_says(bits: int, shape: tuple[int, int, int]) -> None:
    rows, columns, group_size = shape
    quantized = random_layer(rows, columns, bits=bits, group_size=group_size, kind="asymmetric")
    blocks, block_type = Gguf().blocks("fc", quantized)
    step = quantized.scales.float().repeat_interleave(columns if group_size == -1 else group_size, 1)[:, :columns]
    moved = (package_values(blocks, block_type) - exact_values(quantized)).abs() / step
    assert 0 < moved.max() <= (2**bits - 1) / 2**11
    (warning,) = Gguf().check("fc", LayerGrid.of(quantized))
    assert f"at most {'0.73' if bits == 4 else '1.5'}% of a step" in warning
    # From the minimum, which is rounded, in steps of d to our codes.
    zeros = quantized.zero_points.float() + 2 ** (bits - 1)
    minimum = (-zeros * quantized.scales.float()).half().float()
    minimum = minimum.repeat_interleave(columns if group_size == -1 else group_size, 1)[:, :columns]
    unsigned = quantized.codes.float() + 2 ** (bits - 1)
    assert torch.equal(package_values(blocks, block_type), unsigned * step + minimum)


WANTED = {
    ("symmetric", False): ["Q4_0", "Q4_0", "Q4_0", "Q5_0", "Q8_0", "Q8_0", "Q8_0"],
    ("full range", False): ["Q4_0", "Q4_0", "Q4_0", "Q5_0", "Q8_0", "Q8_0", "Q8_0"],
    ("asymmetric", False): ["Q4_0", "Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q8_0"],
    ("asymmetric", True): ["Q4_0", "Q4_0", "Q5_0", "Q8_0", "Q8_0", "Q8_0"],
}


@pytest.mark.parametrize(("kind", "exact"), WANTED)
def test_types_of_grids(kind: str, exact: bool) -> None:
    for bits, wanted in enumerate(WANTED[kind, exact], 2):
        grid = LayerGrid.of(random_layer(2, 32, bits=bits, kind=kind))
        assert Gguf(exact=exact).type_of("fc", grid).name == wanted
        rounded = wanted in ("Q4_1", "Q5_1")
        assert len(Gguf(exact=exact).check("fc", grid)) == rounded
    for kind_ in TYPES.values():
        assert (kind_.columns, kind_.nbytes) == gguf.GGML_QUANT_SIZES[package_type(kind_)]


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind.columns == COLUMNS])
def test_what_the_package_writes_is_read(name: str) -> None:
    kind = TYPES[name]
    values = np.random.default_rng(0).normal(size=(4, 96)).astype(np.float32)
    blocks = torch.from_numpy(gguf.quantize(values, package_type(kind)))
    if kind.has_minimum:
        with pytest.raises(ValueError, match=r"expected minima of layer 'fc' to be -z \* d for a zero point z of 0 to"):
            Gguf().read("fc", blocks, kind)
        return
    quantized = Gguf().read("fc", blocks, kind)
    assert (quantized.bits, quantized.group_size, quantized.full_range) == (kind.bits, 32, True)
    assert torch.equal(exact_values(quantized), package_values(blocks, kind))
    again, again_kind = Gguf().blocks("fc", quantized)
    assert again_kind == kind
    assert torch.equal(again, blocks)


@pytest.mark.parametrize(
    ("bits", "kind"), [(4, "full range"), (5, "full range"), (8, "full range"), (4, "asymmetric"), (5, "asymmetric")]
)
def test_what_is_written_comes_back(bits: int, kind: str) -> None:
    quantized = random_layer(6, 96, bits=bits, kind=kind)
    assert same(Gguf().read("fc", *Gguf().blocks("fc", quantized)), quantized)


def test_small_scales_keep_their_zero_points() -> None:
    """Of scales that float16 holds without all of its bits, too."""
    quantized = random_layer(6, 96, kind="asymmetric")
    small = torch.tensor([2.0**-24, 3 * 2.0**-24, 2.0**-14, 1.5 * 2.0**-14, 6e-5, 0.0])
    quantized.scales.copy_(small[:, None].half().expand(6, 3))
    blocks, kind = Gguf().blocks("fc", quantized)
    read = Gguf().read("fc", blocks, kind)
    assert torch.equal(read.zero_points[:5], quantized.zero_points[:5])
    assert torch.equal(exact_values(read), exact_values(quantized))


GRID = LayerGrid(64, 96, 4, 32, symmetric=True, full_range=True, scale_dtype=torch.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_dtype": torch.bfloat16}, "scales of layer 'h.0.fc' to be float16, but got bfloat16"),
        ({"columns": 100}, "columns of layer 'h.0.fc' to be a multiple of 32, but got 100"),
        ({"group_size": 16}, "group_size of layer 'h.0.fc' to be -1 or a multiple of 32, the columns of a block, but"),
        ({"group_size": 48}, "group_size of layer 'h.0.fc' to be -1 or a multiple of 32, the columns of a block, but"),
        ({"bits": 8, "symmetric": False, "full_range": False}, "bits of layer 'h.0.fc' to be 2 to 7 for an asymmetric"),
    ],
)
def test_layers_that_it_does_not_hold(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^gguf: expected ") as caught:
        Gguf().check("h.0.fc", LayerGrid(**{**vars(GRID), **changes}))
    assert message in str(caught.value)
    assert Gguf().check("h.0.fc", GRID) == []


def test_weights_that_it_does_not_hold() -> None:
    with pytest.raises(ValueError, match="expected scales of layer 'fc' to be float16, but got float32"):
        Gguf().blocks("fc", random_layer(4, 64, dtype=torch.float32))
    huge = random_layer(4, 64, kind="asymmetric")
    huge.scales.fill_(60000)
    with pytest.raises(ValueError, match="expected minima in float16 of layer 'fc' to be finite, but got -inf"):
        Gguf().blocks("fc", huge)
    assert layer_format("gguf").scale_dtype(torch.bfloat16) == torch.float16
    with pytest.raises(ValueError, match=r"gguf: expected the model's dtype to be .*, but got torch.int8"):
        layer_format("gguf").scale_dtype(torch.int8)
    with pytest.raises(ValueError, match=r"layer_format: expected name to be one of .*, gguf, but got 'awq'"):
        layer_format("awq")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (torch.zeros(4, 18), "uint8 of shape [N, a multiple of 18], but got float32 of shape [4, 18]"),
        (torch.zeros(18, dtype=torch.uint8), "but got uint8 of shape [18]"),
        (torch.zeros(4, 20, dtype=torch.uint8), "but got uint8 of shape [4, 20]"),
        (torch.zeros(4, 0, dtype=torch.uint8), "but got uint8 of shape [4, 0]"),
        (torch.full((4, 18), 255, dtype=torch.uint8), "scales of layer 'fc' to be finite, but got nan"),
    ],
)
def test_damaged_blocks(blocks: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=r"^gguf: expected ") as caught:
        Gguf().read("fc", blocks, TYPES["Q4_0"])
    assert message in str(caught.value)
