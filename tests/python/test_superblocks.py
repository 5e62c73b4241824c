"""Grids with two levels of scales: values, losses, options and errors of the functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch

import miniquant
import oracle
from miniquant.grid import SuperblockKind
from miniquant.ridge import LinAlgError
from miniquant.superblocks import GRIDS, SUPERBLOCK

if TYPE_CHECKING:
    from torch import Tensor

KINDS = get_args(SuperblockKind)
LIMITS = {"Q2_K": (1, 15), "Q3_K": (-32, 31), "Q4_K": (1, 63), "Q5_K": (1, 63), "Q6_K": (-128, 127)}


def values_of(quantized: miniquant.SuperblockWeight) -> Tensor:
    """From the steps and their multiples, in float64."""
    grid = GRIDS[quantized.kind]
    per_block = SUPERBLOCK // grid.group_size
    steps = quantized.super_scales.double().repeat_interleave(per_block, 1)
    minimum_steps = quantized.super_minima.double().repeat_interleave(per_block, 1)
    scales = (quantized.scales.double() / steps).round()
    minima = (quantized.minima.double() / minimum_steps).nan_to_num().round()
    lowest = 0 if grid.symmetric else -(2 ** (grid.bits - 1))
    levels = quantized.codes.double() - lowest
    of_columns = [part.repeat_interleave(grid.group_size, 1) for part in (scales * steps, minima * minimum_steps)]
    return levels * of_columns[0] - of_columns[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_are_multiples_of_float16_steps(kind: SuperblockKind, dtype: torch.dtype) -> None:
    weight, hessian = oracle.layer(5, 512, 700, dtype=torch.float32)
    weight = weight.to(dtype)
    lowest, highest = LIMITS[kind]
    for quantized in (
        miniquant.rtn_superblocks(weight, kind),
        miniquant.gptq_superblocks(weight, hessian, kind, **miniquant.preset("best", kind=kind)),
    ):
        grid = GRIDS[kind]
        assert (quantized.kind, quantized.bits, quantized.group_size, quantized.symmetric) == (kind, *grid)
        assert [tensor.dtype for tensor in quantized.tensors[:6]] == [
            *(torch.int8, torch.float32, torch.int8, torch.float32, torch.float16, torch.float16)
        ]
        assert torch.equal(miniquant.dequantize(quantized), values_of(quantized).float())
        assert torch.equal(miniquant.dequantize(quantized, dtype=dtype), values_of(quantized).float().to(dtype))
        steps = quantized.super_scales.float().repeat_interleave(SUPERBLOCK // grid.group_size, 1)
        multiples = quantized.scales / steps
        assert lowest <= multiples.min() <= multiples.max() <= highest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "fast", "best"])
def test_presets_lower_the_loss_that_is_reported(kind: SuperblockKind, name: Any) -> None:
    weight, hessian = oracle.layer(24, 512, 900, dtype=torch.float64)
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(512, dtype=torch.float64)
    quantized = miniquant.gptq_superblocks(weight, hessian, kind, ridge=0.02, **miniquant.preset(name, kind=kind))
    error = weight - values_of(quantized)
    torch.testing.assert_close(quantized.row_loss, ((error @ damped) * error).sum(1), rtol=1e-9, atol=0)
    nearest = weight - values_of(miniquant.rtn_superblocks(weight, kind))
    rounded = ((nearest @ damped) * nearest).sum()
    assert quantized.row_loss.sum() < {"plain": 0.8, "fast": 0.7, "best": 0.6}[name] * rounded


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_of_one_level_is_near(kind: SuperblockKind) -> None:
    """Rounding scales to multiples costs little: sixteen of them at two bits, more else."""
    weight, hessian = oracle.layer(48, 512, 900, dtype=torch.float64)
    grid = GRIDS[kind]
    options = {**grid._asdict(), **miniquant.preset("best", symmetric=grid.symmetric)}
    free = miniquant.gptq(weight, hessian, ridge=0.02, scale_dtype=torch.float32, **options)
    bound = miniquant.gptq_superblocks(weight, hessian, kind, ridge=0.02, **miniquant.preset("best", kind=kind))
    assert bound.row_loss.sum() < 1.15 * free.row_loss.sum()


def test_a_weight_in_superblocks_goes_where_others_go(tmp_path: Any) -> None:
    weight, hessian = oracle.layer(4, 256, 300, dtype=torch.float32)
    quantized = miniquant.gptq_superblocks(weight, hessian, "Q4_K")
    exact = miniquant.quantization_loss(weight, miniquant.dequantize(quantized), hessian)
    assert torch.equal(miniquant.quantization_loss(weight, quantized, hessian), exact)
    half = quantized.map(lambda tensor: tensor[:2])
    assert isinstance(half, miniquant.SuperblockResult)
    assert torch.equal(miniquant.dequantize(half), miniquant.dequantize(quantized)[:2])
    with pytest.raises(TypeError, match="save_layer: expected quantized to have one level of scales, but got a Sup"):
        miniquant.save_layer(tmp_path / "layer.safetensors", quantized)
    with pytest.raises(TypeError, match=r"expected quantized to have one level of scales, .*Result \(Q4_K\)"):
        miniquant.QuantizedLinear.from_quantized(quantized)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "Q4_0"}, "expected kind to be 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K' or 'Q6_K', but got 'Q4_0'"),
        ({"weight": torch.ones(2, 96)}, r"expected weight to have columns in multiples of 256, .* got shape \[2, 96\]"),
        ({"weight": torch.ones(256)}, r"expected weight to be a matrix \[N, K\], but got shape \[256\]"),
        ({"weight": torch.full((2, 256), torch.nan)}, r"expected weight to be finite, but got nan at \[0, 0\]"),
    ],
)
def test_bad_arguments_of_both(arguments: dict[str, Any], message: str) -> None:
    given = {"weight": torch.ones(2, 256), "kind": "Q4_K", **arguments}
    with pytest.raises(ValueError, match=f"rtn_superblocks: {message}"):
        miniquant.rtn_superblocks(given["weight"], given["kind"])
    with pytest.raises(ValueError, match=f"gptq_superblocks: {message}"):
        miniquant.gptq_superblocks(given["weight"], torch.eye(256), given["kind"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_method": "loss"}, "expected group_scales to be 'dynamic' with scale_method='loss'"),
        ({"group_scales": "dynamic", "column_order": "activation"}, "expected column_order to be 'natural' or 'group'"),
        ({"ridge": -1.0}, "expected ridge to be finite and not negative, but got -1"),
        ({"refine": -1}, "expected refine to be a number of rounds, 0 or more, but got -1"),
        ({"hessian": torch.eye(255)}, r"expected hessian to have shape \[K, K\] = \[256, 256\]"),
    ],
)
def test_bad_arguments_of_gptq(options: dict[str, Any], message: str) -> None:
    hessian = options.pop("hessian", torch.eye(256))
    with pytest.raises(ValueError, match=f"gptq_superblocks: {message}"):
        miniquant.gptq_superblocks(torch.ones(2, 256), hessian, "Q4_K", **options)


def test_a_hessian_that_is_not_positive_definite_is_refused() -> None:
    hessian = torch.ones(256, 256)
    with pytest.raises(LinAlgError, match="gptq_superblocks: expected hessian to be positive definite"):
        miniquant.gptq_superblocks(torch.ones(2, 256), hessian, "Q2_K", ridge=0.0)


def test_presets_of_kinds_leave_out_what_kinds_have() -> None:
    assert miniquant.preset("best", kind="Q6_K") == {
        key: value for key, value in miniquant.preset("best").items() if key not in ("full_range", "symmetric")
    }
    with pytest.raises(ValueError, match=r"preset: expected kind to be one of Q2_K, .*, Q6_K, but got 'Q7'"):
        miniquant.preset("best", kind="Q7")  # type: ignore[arg-type]
