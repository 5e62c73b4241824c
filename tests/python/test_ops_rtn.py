"""rtn: exactly the grid's definition, for every grid, dtype, shape and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import miniquant
import oracle

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Rows: one, and more than a panel of rows and not a multiple of anything. Columns: one, fewer than a vector, a
# multiple of every vector, one more.
SHAPES = [(1, 1), (1, 64), (3, 5), (7, 128), (97, 129)]

# One column per group; not a divisor; the default; one group per row; longer than the row.
GROUP_SIZES = [1, 7, 64, -1, 1000]


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of magnitudes from 1e-4 to 1e4: a fixed scale would fail."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** (torch.rand(rows, 1, generator=generator) * 8 - 4)
    return (torch.randn(rows, columns, generator=generator) * size).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_is_the_definition(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    for seed, (rows, columns) in enumerate(SHAPES):
        weight = random_weight(rows, columns, dtype, seed)
        for group_size in GROUP_SIZES:
            actual = miniquant.rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric)
            expected = oracle.rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric)
            assert oracle.same_bits(actual, expected), (rows, columns, group_size)
            assert all(tensor.is_contiguous() for tensor in actual)


def test_the_labs_grid() -> None:
    weight = random_weight(64, 768, torch.float32)
    codes, scales, zero_points = miniquant.rtn(weight)
    grouped = weight.view(64, 12, 64)
    assert torch.equal(scales, grouped.abs().amax(2) / 7)
    assert torch.equal(codes.view(64, 12, 64).abs().amax(2), torch.full((64, 12), 7, dtype=torch.int8))
    assert not zero_points.any()
    # No weight is more than half a step from its grid point, except for one rounding of the division.
    error = (grouped.double() - codes.view(64, 12, 64).double() * scales[..., None].double()).abs()
    assert bool((error <= scales[..., None].double() * (0.5 + 8 * torch.finfo(torch.float32).eps)).all())


def test_ties_go_to_the_even_level() -> None:
    weight = torch.tensor([[0.25, 0.75, 1.25, 1.75, -0.25, -0.75, -1.25, 3.25]])
    scales = torch.tensor([[0.5]])
    codes = miniquant.rtn(weight, group_size=-1, scales=scales).codes
    assert codes.tolist() == [[0, 2, 2, 4, 0, -2, -2, 6]]
    # The level is rounded, not the code: with an odd zero point ties still go to even levels.
    zero_points = torch.tensor([[1]], dtype=torch.int8)
    codes = miniquant.rtn(weight, group_size=-1, symmetric=False, scales=scales, zero_points=zero_points).codes
    assert codes.tolist() == [[1, 3, 3, 5, 1, -1, -1, 7]]


def test_divides_by_the_scale() -> None:
    """For some s, 3.5 * s is a tie of the division by s and not of the product with 1 / s."""
    scales = torch.rand(4096, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    weight = scales * 3.5
    quotients = (weight / scales).round()
    assert (quotients != (weight * (1 / scales)).round()).any(), "these scales cannot tell the two apart"
    assert torch.equal(miniquant.rtn(weight, group_size=-1, scales=scales).codes, quotients.to(torch.int8))


def test_zero_is_exact_on_an_asymmetric_grid() -> None:
    weight = random_weight(33, 70, torch.float32).abs()
    weight[::2] *= -1
    weight[:, ::5] = 0
    codes, scales, zero_points = miniquant.rtn(weight, group_size=32, symmetric=False)
    assert not miniquant.dequantize(codes, scales, zero_points, 32)[:, ::5].any()
    # A group on one side of 0 puts 0 at the end of its codes.
    assert zero_points.unique().tolist() == [-8, 7]


def test_asymmetric_error_is_at_most_half_a_step() -> None:
    """Except at the ends of the range, where the rounded zero point may add up to half a step."""
    weight = random_weight(64, 256, torch.float64)
    for bits in (2, 4, 8):
        codes, scales, zero_points = miniquant.rtn(weight, bits=bits, group_size=64, symmetric=False)
        step = scales.repeat_interleave(64, dim=1)
        error = (weight - miniquant.dequantize(codes, scales, zero_points, 64)).abs() / step
        inside = (codes > -(2 ** (bits - 1))) & (codes < 2 ** (bits - 1) - 1)
        assert error[inside].max() <= 0.5 + 1e-12
        assert error.max() <= 1.0 + 1e-12


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_all_zero_groups(symmetric: bool) -> None:
    weight = random_weight(5, 24, torch.float32)
    weight[:, 8:16] = 0
    weight[3] = 0
    codes, scales, zero_points = miniquant.rtn(weight, group_size=8, symmetric=symmetric)
    assert bool(scales.isfinite().all())
    assert bool((scales > 0).all())
    values = miniquant.dequantize(codes, scales, zero_points, 8)
    assert not values[:, 8:16].any()
    assert not values[3].any()
    assert values[0, :8].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_extreme_weights(symmetric: bool, dtype: torch.dtype) -> None:
    """The largest and the smallest numbers of the dtype: no scale overflows, none becomes 0."""
    info = torch.finfo(dtype)
    largest = torch.tensor([[info.max, -info.max, info.max / 2, 0.0]], dtype=dtype)
    smallest = torch.tensor([[info.smallest_normal, -info.smallest_normal, 0.0, 0.0]], dtype=dtype)
    for weight in (largest, smallest, smallest * 0.25):
        codes, scales, zero_points = miniquant.rtn(weight, symmetric=symmetric)
        assert bool(scales.isfinite().all())
        assert bool((scales > 0).all())
        levels = codes.double() - zero_points.double()
        assert not levels[weight == 0].any()
        # In steps, where neither the largest nor the smallest numbers leave the range of float64.
        steps = weight.double() / scales.double()
        assert (levels - steps).abs().max() <= (0.5 if symmetric else 1.0) + 16 * info.eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_use_the_rounded_scale(dtype: torch.dtype) -> None:
    weight = random_weight(97, 256, dtype) * 0.02
    codes, scales, _ = miniquant.rtn(weight)
    unrounded = weight.float().view(97, 4, 64).abs().amax(2) / 7
    assert scales.dtype == dtype
    assert torch.equal(scales, unrounded.to(dtype))
    by_unrounded = (weight.float().view(97, 4, 64) / unrounded[..., None]).round().clamp(-7, 7).view(97, 256)
    assert (codes != by_unrounded).any(), "these weights cannot tell the two scales apart"
    by_rounded = (weight.float().view(97, 4, 64) / scales.float()[..., None]).round().clamp(-7, 7).view(97, 256)
    assert torch.equal(codes, by_rounded.to(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_scales(dtype: torch.dtype) -> None:
    weight = random_weight(9, 100, dtype)
    _, scales, zero_points = oracle.rtn(weight, bits=3, group_size=33, symmetric=False)
    scales = (scales.float() * 0.7).to(dtype)
    for symmetric in (True, False):
        given: dict[str, Any] = {
            "scales": scales,
            "zero_points": torch.zeros_like(zero_points) if symmetric else zero_points,
        }
        actual = miniquant.rtn(weight, bits=3, group_size=33, symmetric=symmetric, **given)
        expected = oracle.rtn(weight, bits=3, group_size=33, symmetric=symmetric, **given)
        assert oracle.same_bits(actual, expected)
        assert torch.equal(actual.scales, scales)
        assert actual.scales.data_ptr() != scales.data_ptr()
        assert actual.zero_points.data_ptr() != given["zero_points"].data_ptr()
    strided = torch.stack([scales, scales], dim=2)[..., 1]
    assert not strided.is_contiguous()
    assert oracle.same_bits(
        miniquant.rtn(weight, bits=3, group_size=33, scales=strided),
        oracle.rtn(weight, bits=3, group_size=33, scales=scales),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_do_not_matter_and_nothing_is_changed(dtype: torch.dtype) -> None:
    weight = random_weight(37, 130, dtype)
    expected = miniquant.rtn(weight, group_size=48)
    for name, view in oracle.awkward_layouts(weight).items():
        before = view.clone()
        version = view._version
        assert oracle.same_bits(miniquant.rtn(view, group_size=48), expected), name
        assert torch.equal(view, before)
        assert view._version == version
    expanded = weight[:1].expand(4, -1)
    assert torch.equal(miniquant.rtn(expanded, group_size=48).codes, expected.codes[:1].expand(4, -1))


def test_nothing_is_recorded_for_autograd() -> None:
    weight = random_weight(4, 64, torch.float32)
    expected = miniquant.rtn(weight)
    assert oracle.same_bits(miniquant.rtn(torch.nn.Parameter(weight)), expected)
    assert not any(tensor.requires_grad for tensor in miniquant.rtn((weight * 1).requires_grad_()))
    with torch.inference_mode():
        assert oracle.same_bits(miniquant.rtn(weight + 0), expected)


@pytest.mark.parametrize("shape", [(0, 64), (0, 0), (3, 0), (0, 1)])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_empty_weights(shape: tuple[int, int], group_size: int) -> None:
    codes, scales, zero_points = miniquant.rtn(torch.empty(shape), group_size=group_size)
    groups = 0 if shape[1] == 0 else 1
    assert codes.shape == shape
    assert scales.shape == zero_points.shape == (shape[0], groups)
    assert (codes.dtype, scales.dtype, zero_points.dtype) == (torch.int8, torch.float32, torch.int8)
