"""A quantized weight includes its grid: dequantizing, packing, measuring and compiling take it whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import miniquant
import oracle

GRIDS: list[dict[str, Any]] = [
    {},
    {"bits": 3, "group_size": -1},
    {"bits": 8, "group_size": 7, "symmetric": False},
    {"bits": 2, "group_size": 1000, "full_range": True},
]


def bfloat16_layer() -> tuple[Tensor, Tensor]:
    """A weight with enough rows for a meaningful ratio of losses."""
    weight, hessian = oracle.layer(256, 256, 600, dtype=torch.bfloat16)
    return weight, hessian.float()


@pytest.mark.parametrize("grid", GRIDS, ids=oracle.option_id)
def test_results_know_their_grid(grid: dict[str, Any]) -> None:
    weight, hessian = oracle.layer(5, 20, 50, dtype=torch.float32)
    expected = {"bits": 4, "group_size": 64, "symmetric": True, "full_range": False, **grid}
    for result in (
        miniquant.rtn(weight, **grid),
        miniquant.gptq(weight, hessian, **grid),
        miniquant.gptq_reference(weight, hessian, **grid),
    ):
        assert {name: getattr(result, name) for name in expected} == expected
        codes, scales, zero_points = result.tensors[:3]
        values = miniquant.dequantize(result)
        assert torch.equal(values, miniquant.dequantize(codes, scales, zero_points, expected["group_size"]))
        loss = miniquant.quantization_loss(weight, result, hessian)
        assert torch.equal(loss, miniquant.quantization_loss(weight, values, hessian))


def test_a_result_is_its_tensors_when_unpacked() -> None:
    weight, hessian = oracle.layer(5, 20, 50, dtype=torch.float32)
    codes, scales, zero_points = nearest = miniquant.rtn(weight)
    assert (codes is nearest.codes, scales is nearest.scales, zero_points is nearest.zero_points) == (True,) * 3
    *grid, row_loss = result = miniquant.gptq(weight, hessian)
    assert row_loss is result.row_loss
    assert oracle.same_bits(grid, (result.codes, result.scales, result.zero_points))


def test_an_unpacked_result_is_never_dequantized_wrongly() -> None:
    weight, hessian = oracle.layer(5, 20, 50, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"dequantize: expected group_size beside codes .*, but got no group_size"):
        miniquant.dequantize(*miniquant.rtn(weight))
    with pytest.raises(TypeError, match=r"dequantize: expected group_size to be an int, but got a torch\.Tensor"):
        miniquant.dequantize(*miniquant.gptq(weight, hessian))
    with pytest.raises(TypeError, match="dequantize: expected no group_size beside a QuantizedWeight"):
        miniquant.dequantize(miniquant.rtn(weight), group_size=64)  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dequantizes_to_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    weight, _ = oracle.layer(5, 20, 50, dtype=torch.bfloat16)
    quantized = miniquant.rtn(weight, bits=8, group_size=8)
    exact = miniquant.dequantize(quantized, dtype=torch.float64)
    by_hand = quantized.codes.double() * quantized.scales.double().repeat_interleave(8, dim=1)[:, :20]
    assert torch.equal(exact, by_hand)
    values = miniquant.dequantize(quantized, dtype=dtype)
    assert values.dtype == dtype
    assert torch.equal(values, exact.to(dtype)), "rounded once"


def test_row_loss_is_that_of_the_exact_values_and_a_bfloat16_layer_loses_more() -> None:
    weight, hessian = bfloat16_layer()
    result = miniquant.gptq(weight, hessian, bits=8, ridge=0.01)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(256)).double()
    exact = miniquant.quantization_loss(weight, miniquant.dequantize(result, dtype=torch.float32), damped)
    # float32 sums of 256 products in the sweep
    torch.testing.assert_close(result.row_loss, exact, rtol=256 * torch.finfo(torch.float32).eps, atol=0.0)
    assert torch.equal(miniquant.quantization_loss(weight, result, damped), exact)
    stored = miniquant.quantization_loss(weight, miniquant.dequantize(result), damped)
    assert float(stored.sum() / exact.sum()) == pytest.approx(1.36, abs=0.03)


def test_the_loss_takes_values_of_any_dtype() -> None:
    weight, hessian = oracle.layer(3, 10, 30, dtype=torch.float32)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        values = weight.to(dtype) * 0.5
        loss = miniquant.quantization_loss(weight, values, hessian)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, miniquant.quantization_loss(weight.double(), values.double(), hessian).float())


def test_results_go_through_compiled_functions() -> None:
    def quantize(weight: Tensor, hessian: Tensor) -> tuple[miniquant.QuantizedWeight, miniquant.GptqResult, Tensor]:
        result = miniquant.gptq(weight, hessian, group_size=16)
        loss = miniquant.quantization_loss(weight, result, hessian)
        return miniquant.rtn(weight, group_size=16), result, miniquant.dequantize(result) + loss[:, None]

    weight, hessian = oracle.layer(6, 40, 90, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(quantize, fullgraph=True, backend="aot_eager")(weight, hessian)
    expected = quantize(weight, hessian)
    assert oracle.same_bits(compiled[0], expected[0])
    assert oracle.same_bits(compiled[1], expected[1])
    assert torch.equal(compiled[2], expected[2])
    assert (compiled[1].bits, compiled[1].group_size) == (4, 16)
    taken = torch.compile(miniquant.dequantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(taken(expected[1]), miniquant.dequantize(expected[1]))


def test_results_go_through_export() -> None:
    class Quantize(torch.nn.Module):
        def forward(self, weight: Tensor, hessian: Tensor) -> miniquant.GptqResult:
            return miniquant.gptq(weight, hessian, bits=3)

    weight, hessian = oracle.layer(6, 40, 90, dtype=torch.float32)
    result = torch.export.export(Quantize(), (weight, hessian)).module()(weight, hessian)
    assert isinstance(result, miniquant.GptqResult)
    assert oracle.same_bits(result, miniquant.gptq(weight, hessian, bits=3))
    assert result.bits == 3
