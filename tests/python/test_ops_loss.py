"""quantization_loss: e H e^T per row."""

from __future__ import annotations

import pytest
import torch

import miniquant
import oracle

# One of each; fewer columns than a vector; more rows than a panel, and columns that are no multiple of anything.
SHAPES = [(1, 1), (3, 5), (7, 64), (97, 129)]


def expected_loss(weight: torch.Tensor, dequantized: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    error = weight.double() - dequantized.double()
    return torch.from_numpy(oracle.quadratic_form(error.numpy(), hessian.double().numpy()))


@pytest.mark.parametrize("hessian_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_is_the_formula(dtype: torch.dtype, hessian_dtype: torch.dtype) -> None:
    result_dtype = oracle.compute_dtype(dtype)
    for rows, columns in SHAPES:
        weight, hessian = oracle.layer(rows, columns, 3 * columns, dtype=dtype)
        hessian = hessian.to(hessian_dtype)
        dequantized = weight + (torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.01).to(dtype)
        actual = miniquant.quantization_loss(weight, dequantized, hessian)
        expected = expected_loss(weight, dequantized, hessian)
        assert actual.dtype == result_dtype
        # Sums of K^2 products in float64, positive semi-definite (the correlated inputs cancel little), rounded once.
        tolerance = 8 * columns * torch.finfo(torch.float64).eps + torch.finfo(result_dtype).eps
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=0.0)


def test_is_the_mean_squared_output_error() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    inputs = torch.randn(40, 300, generator=generator, dtype=torch.float64)
    codes, scales, zero_points = miniquant.rtn(weight, group_size=8)
    dequantized = miniquant.dequantize(codes, scales, zero_points, 8)
    loss = miniquant.quantization_loss(weight, dequantized, inputs @ inputs.mT / 300)
    outputs = ((weight - dequantized) @ inputs).square().mean(1)
    torch.testing.assert_close(loss, outputs, rtol=1e-12, atol=0.0)


def test_float32_weights_are_summed_in_float64() -> None:
    """A long row of equal products, where float32 partial sums would lose digits."""
    columns = 4096
    weight = torch.full((1, columns), 0.1)
    loss = miniquant.quantization_loss(weight, torch.zeros(1, columns), torch.ones(columns, columns))
    error = float(weight[0, 0])
    assert abs(loss.item() / (error * columns) ** 2 - 1) <= torch.finfo(torch.float32).eps


def test_no_error_no_loss() -> None:
    weight, hessian = oracle.layer(4, 9, 30)
    assert not miniquant.quantization_loss(weight, weight.clone(), hessian).any()


def test_layouts_do_not_matter_and_nothing_is_changed() -> None:
    weight, hessian = oracle.layer(11, 21, 60)
    dequantized = weight.round(decimals=2)
    expected = miniquant.quantization_loss(weight, dequantized, hessian)
    weights, others, hessians = (oracle.awkward_layouts(tensor) for tensor in (weight, dequantized, hessian))
    for name, view in weights.items():
        assert torch.equal(miniquant.quantization_loss(view, others[name], hessians[name]), expected), name
        assert torch.equal(view, weight)
        assert torch.equal(others[name], dequantized)
        assert torch.equal(hessians[name], hessian)


def test_nothing_is_recorded_for_autograd() -> None:
    weight, hessian = oracle.layer(2, 4, 8)
    loss = miniquant.quantization_loss(weight.requires_grad_(), torch.zeros(2, 4, dtype=weight.dtype), hessian)
    assert not loss.requires_grad


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    loss = miniquant.quantization_loss(torch.zeros(shape), torch.zeros(shape), torch.eye(shape[1]))
    assert torch.equal(loss, torch.zeros(shape[0]))
