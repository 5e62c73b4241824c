"""dequantize: (code - zero point) * scale, each group with its own."""

from __future__ import annotations

import pytest
import torch

import miniquant
import oracle


def random_codes(rows: int, columns: int, groups: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Codes and zero points over all of int8, scales below and above 1, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8),
        torch.rand(rows, groups, generator=generator, dtype=torch.float64) * 2 + 0.01,
        torch.randint(-128, 128, (rows, groups), generator=generator, dtype=torch.int8),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "group_size", "groups"),
    [((1, 1), 1, 1), ((5, 7), 1, 7), ((5, 7), 3, 3), ((5, 7), -1, 1), ((5, 7), 64, 1), ((33, 130), 64, 3)],
)
def test_is_the_formula(shape: tuple[int, int], group_size: int, groups: int, dtype: torch.dtype) -> None:
    codes, scales, zero_points = random_codes(*shape, groups)
    scales = scales.to(dtype)
    actual = miniquant.dequantize(codes, scales, zero_points, group_size)
    # The difference of two int8 is exact in every compute dtype, so the product is rounded only once. This also holds
    # for the half types, whose product fits into float32's 24 bits (9 + 11).
    expected = torch.from_numpy(oracle.dequantize(codes, scales, zero_points, group_size)).to(dtype)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


def test_the_widest_difference() -> None:
    codes = torch.tensor([[-128, 127]], dtype=torch.int8)
    zero_points = torch.tensor([[127, -128]], dtype=torch.int8)
    assert miniquant.dequantize(codes, torch.ones(1, 2), zero_points, 1).tolist() == [[-255.0, 255.0]]


def test_inverts_rtn_to_half_a_step() -> None:
    weight = torch.randn(16, 100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    codes, scales, zero_points = miniquant.rtn(weight, group_size=32)
    error = (weight - miniquant.dequantize(codes, scales, zero_points, 32)).abs()
    step = scales.repeat_interleave(32, dim=1)[:, :100]
    assert bool((error <= step * (0.5 + 1e-12)).all())


def test_layouts_do_not_matter_and_nothing_is_changed() -> None:
    codes, scales, zero_points = random_codes(6, 10, 4)
    expected = miniquant.dequantize(codes, scales, zero_points, 3)
    strided_codes = torch.stack([codes, codes], dim=2)[..., 1]
    strided_scales = scales.t().contiguous().t()
    strided_zeros = torch.stack([zero_points, zero_points])[1].t().contiguous().t()
    before = (strided_codes.clone(), strided_scales.clone(), strided_zeros.clone())
    assert torch.equal(miniquant.dequantize(strided_codes, strided_scales, strided_zeros, 3), expected)
    assert oracle.same_bits((strided_codes, strided_scales, strided_zeros), before)


def test_nothing_is_recorded_for_autograd() -> None:
    codes, scales, zero_points = random_codes(2, 4, 2)
    assert not miniquant.dequantize(codes, scales.requires_grad_(), zero_points, 2).requires_grad


@pytest.mark.parametrize(("shape", "groups"), [((0, 8), 2), ((3, 0), 0), ((0, 0), 0)])
def test_empty(shape: tuple[int, int], groups: int) -> None:
    codes, scales, zero_points = random_codes(*shape, groups)
    actual = miniquant.dequantize(codes, scales, zero_points, 4)
    assert actual.shape == shape
    assert actual.dtype == torch.float64
