"""scale_dtype: scales are rounded as they will be stored before codes are chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import miniquant
import oracle

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRESETS: dict[str, dict[str, Any]] = {name: miniquant.preset(name) for name in ("plain", "fast", "best")}
PRESETS["asymmetric"] = {"symmetric": False}


def layer(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight of 12 x 64 and a Hessian for it."""
    weight, hessian = oracle.layer(12, 64, 200, dtype=torch.float64)
    return weight.to(dtype), hessian


def requantized(weight: Tensor, hessian: Tensor, given: Tensor, zero_points: Tensor, **options: Any) -> Any:
    """gptq in natural order with given scales and zero points."""
    return miniquant.gptq(weight, hessian, group_size=16, scales=given, zero_points=zero_points, **options)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_row_loss_is_that_of_the_scales_as_stored(preset: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    """If codes were chosen with other scales than the returned ones, the loss of the returned weight would differ."""
    weight, hessian = layer(dtype)
    quantized = miniquant.gptq(weight, hessian, group_size=16, scale_dtype=stored, **PRESETS[preset])
    assert quantized.scales.dtype == stored
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    exact = miniquant.dequantize(quantized.codes, quantized.scales.to(torch.float64), quantized.zero_points, 16)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    loss = miniquant.quantization_loss(weight.double(), exact, damped)
    eps = torch.finfo(compute).eps
    # The error of a running sum of 64 columns in the compute dtype.
    torch.testing.assert_close(quantized.row_loss.double(), loss, rtol=64 * eps, atol=0)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_plain_scales_are_the_group_ranges_rounded(stored: torch.dtype) -> None:
    weight, hessian = layer(torch.float32)
    expected = (weight.view(12, 4, 16).abs().amax(2) / 7).to(stored)
    for quantized in (
        miniquant.rtn(weight, group_size=16, scale_dtype=stored),
        miniquant.gptq(weight, hessian, group_size=16, scale_dtype=stored),
        miniquant.gptq_reference(weight, hessian, group_size=16, scale_dtype=stored),
    ):
        assert torch.equal(quantized.scales, expected)
    nearest = miniquant.rtn(weight, group_size=16, scale_dtype=stored)
    codes = (weight.view(12, 4, 16) / expected.float()[..., None]).round().clamp(-7, 7).view(12, 64)
    assert torch.equal(nearest.codes, codes.to(torch.int8))


def test_the_weights_own_dtype_is_the_default() -> None:
    for dtype in (*DTYPES, torch.float64):
        weight, hessian = layer(dtype)
        expected = miniquant.gptq(weight, hessian, group_size=16)
        assert expected.scales.dtype == dtype
        found = miniquant.gptq(weight, hessian, group_size=16, scale_dtype=dtype)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_the_reference_chooses_the_same_codes(stored: torch.dtype) -> None:
    weight, hessian = layer(torch.float64)
    for options in ({}, {"symmetric": False}, {"group_scales": "dynamic"}, {"full_range": True}):
        fast = miniquant.gptq(weight, hessian, group_size=16, scale_dtype=stored, **options)
        textbook = miniquant.gptq_reference(weight, hessian, group_size=16, scale_dtype=stored, **options)
        assert torch.equal(fast.codes, textbook.codes)
        assert torch.equal(fast.scales, textbook.scales)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_given_scales_have_that_dtype(stored: torch.dtype) -> None:
    weight, hessian = layer(torch.bfloat16)
    first = miniquant.gptq(weight, hessian, group_size=16, scale_dtype=stored)
    again = requantized(weight, hessian, first.scales, first.zero_points, scale_dtype=stored)
    assert again.scales.dtype == stored
    assert torch.equal(again.codes, first.codes)
    other = torch.float32 if stored != torch.float32 else torch.float16
    name = str(stored).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"^gptq: expected scales to have scale_dtype \\({name}\\), but got "):
        requantized(weight, hessian, first.scales.to(other), first.zero_points, scale_dtype=stored)


def test_float32_scales_of_a_bfloat16_weight_are_not_rounded_to_bfloat16() -> None:
    weight, hessian = layer(torch.bfloat16)
    scales = miniquant.gptq(weight, hessian, group_size=16, scale_dtype=torch.float32).scales
    assert not torch.equal(scales, scales.bfloat16().float())


@pytest.mark.parametrize("bad", [torch.int8, torch.float64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(bad: torch.dtype) -> None:
    weight, hessian = layer(torch.float32)
    name = str(bad).removeprefix("torch.")
    message = f"expected scale_dtype to be float32, bfloat16 or float16 for a float32 weight, but got {name}"
    with pytest.raises(TypeError, match=f"^rtn: {message}"):
        miniquant.rtn(weight, scale_dtype=bad)
    with pytest.raises(TypeError, match=f"^gptq: {message}"):
        miniquant.gptq(weight.to("meta"), hessian.to("meta"), scale_dtype=bad)


def test_gptq_auto_takes_it() -> None:
    accumulator = miniquant.HessianAccumulator(64, halves=True)
    accumulator.update(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).cumsum(1))
    automatic: Any = miniquant.gptq_auto(layer(torch.float32)[0], accumulator, scale_dtype=torch.float16)
    assert getattr(automatic, "result", automatic).scales.dtype == torch.float16
