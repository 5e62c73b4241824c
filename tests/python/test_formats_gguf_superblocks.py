"""GGUF's superblocks, against the package gguf: it reads our weights, and we read any bytes as it does."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import gguf
import pytest
import torch

import miniquant
import oracle
from miniquant.formats import CompressedTensors, Gguf, Gptq, LayerGrid, Native
from miniquant.formats.gguf_blocks import TYPES
from miniquant.formats.gguf_superblocks import NBYTES, pack, unpack
from miniquant.grid import SuperblockKind

KINDS = get_args(SuperblockKind)
STEPS_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # bytes of float16


def package_values(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """What the package reads."""
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]))


def quantized_layer(kind: SuperblockKind) -> miniquant.SuperblockResult:
    weight, hessian = oracle.layer(6, 768, 900, dtype=torch.float32)
    return miniquant.gptq_superblocks(weight * 0.02, hessian, kind, **miniquant.preset("best", kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_reads_equal_weights(kind: SuperblockKind) -> None:
    quantized = quantized_layer(kind)
    blocks, block_type = Gguf().blocks("fc", quantized)
    assert (256, block_type.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert (blocks.dtype, tuple(blocks.shape)) == (torch.uint8, (6, 3 * NBYTES[kind]))
    assert blocks.numel() == Gguf().nbytes("fc", LayerGrid.of(quantized))
    assert torch.equal(package_values(blocks, kind), miniquant.dequantize(quantized))
    again = Gguf().read("fc", blocks, block_type)
    assert isinstance(again, miniquant.SuperblockWeight)
    for part in ("codes", "scales", "zero_points", "minima", "super_scales", "super_minima"):
        assert torch.equal(getattr(again, part), getattr(quantized, part)), part


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_are_read_as_the_package_reads_them_and_come_back(kind: SuperblockKind) -> None:
    blocks = torch.randint(0, 256, (8, 2, NBYTES[kind]), dtype=torch.uint8)
    for place in STEPS_AT[kind]:
        steps = (torch.rand(8, 2, 1) - 0.3).half() if kind in ("Q3_K", "Q6_K") else torch.rand(8, 2, 1).half()
        blocks[:, :, place : place + 2] = steps.view(torch.uint8).view(8, 2, 2)
    stored = blocks.flatten(1)
    quantized = unpack(stored, kind)
    assert torch.equal(miniquant.dequantize(quantized), package_values(stored, kind))
    assert torch.equal(pack(quantized), stored)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_between_multiples_are_refused(kind: SuperblockKind) -> None:
    quantized = quantized_layer(kind)
    scales = quantized.scales.clone()
    scales[2, 5] += 0.4 * quantized.super_scales[2, 0].float()
    with pytest.raises(ValueError, match=r"gguf: layer 'fc': expected scales to be whole multiples, .* of the step"):
        Gguf().blocks("fc", replace(quantized, scales=scales))
    if not quantized.symmetric:
        with pytest.raises(ValueError, match="layer 'fc': expected minima to be whole multiples, 0 to "):
            Gguf().blocks("fc", replace(quantized, minima=-quantized.minima - quantized.super_minima.float().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_other_formats_refuse_them_and_say_which_holds_them(kind: SuperblockKind) -> None:
    grid = LayerGrid.of(quantized_layer(kind))
    for form in (CompressedTensors(), Gptq(version=1), Gptq(version=2), Native()):
        with pytest.raises(ValueError, match=f"expected layer 'fc' to have one level of scales, but got {kind}, "):
            form.check("fc", grid)
    assert Gguf().check("fc", grid) == []
    assert Gguf().type_of("fc", grid) == TYPES[kind]


def test_columns_that_are_no_superblocks_are_refused() -> None:
    grid = LayerGrid(4, 576, 4, 32, symmetric=False, full_range=False, scale_dtype=torch.float32, superblocks="Q4_K")
    with pytest.raises(ValueError, match="columns of layer 'fc' to be a multiple of 256 for Q4_K, but got 576"):
        Gguf().check("fc", grid)
    with pytest.raises(ValueError, match=r"LayerGrid: expected bits, group_size, .* of Q5_K to be "):
        replace(grid, superblocks="Q5_K")
    with pytest.raises(ValueError, match=r"LayerGrid: expected superblocks to be one of Q2_K, .* but got 'Q4_1'"):
        replace(grid, superblocks="Q4_1")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfinished_run_keeps_all_of_a_layer(kind: SuperblockKind) -> None:
    quantized, form = quantized_layer(kind), Native()
    tensors = form.tensors("fc", quantized)
    grids = form.layers(form.config({"fc": LayerGrid.of(quantized)}), tensors)
    again = form.read("fc", tensors, grids["fc"])
    assert isinstance(again, miniquant.SuperblockResult)
    assert again.kind == kind
    assert all(torch.equal(one, other) for one, other in zip(again.tensors, quantized.tensors, strict=True))
    rounded = miniquant.rtn_superblocks(torch.randn(3, 256), kind)
    tensors = form.tensors("fc", rounded)
    again = form.read("fc", tensors, form.layers(form.config({"fc": LayerGrid.of(rounded)}), tensors)["fc"])
    assert type(again) is miniquant.SuperblockWeight
    del tensors["fc.super_scales"]
    with pytest.raises(ValueError, match=r"expected a tensor 'fc.super_scales' of layer 'fc', but got none"):
        form.read("fc", tensors, LayerGrid.of(rounded))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_are_not_finite_are_refused(kind: SuperblockKind) -> None:
    blocks, block_type = Gguf().blocks("fc", quantized_layer(kind))
    place = STEPS_AT[kind][-1]
    damaged = blocks.view(6, 3, -1).clone()
    damaged[1, 2, place : place + 2] = torch.tensor([torch.inf]).half().view(torch.uint8)
    with pytest.raises(ValueError, match="layer 'fc' to be finite, but got inf"):
        Gguf().read("fc", damaged.flatten(1), block_type)
