"""hessian_update_ and the accumulator: X^T X, in place, for any division of the tokens into batches."""

from __future__ import annotations

import pytest
import torch

import miniquant
import oracle

# Tokens: none, one, around the operator's partial sums of 256, several of them. Columns: one, fewer than a vector,
# around its tiles.
SIZES = [(0, 3), (1, 1), (1, 5), (255, 16), (256, 17), (257, 64), (1000, 97)]


def bound(hessian: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The max error of a sum of H and n products: (n + 1) eps (|H| + |X|^T |X|), Higham's bound for any order."""
    tokens = inputs.double().abs()
    eps = torch.finfo(hessian.dtype).eps
    return (len(tokens) + 1) * eps * (hessian.double().abs() + tokens.mT @ tokens)


@pytest.mark.parametrize("inputs_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adds_the_products(dtype: torch.dtype, inputs_dtype: torch.dtype) -> None:
    for tokens, columns in SIZES:
        generator = torch.Generator().manual_seed(tokens)
        inputs = torch.randn(tokens, columns, generator=generator).to(inputs_dtype)
        start = torch.randn(columns, columns, generator=generator, dtype=dtype)
        hessian = (start + start.mT).clone()
        before = hessian.clone()
        result = miniquant.hessian_update_(hessian, inputs)
        assert result is hessian
        cast = inputs.to(dtype).double()
        expected = before.double() + cast.mT @ cast
        assert bool(((hessian.double() - expected).abs() <= bound(before, inputs.to(dtype))).all()), (tokens, columns)
        assert torch.equal(hessian, hessian.mT), "the two halves are the same bits"


@pytest.mark.parametrize("inputs_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("powers_of_two", [False, True])
def test_tokens_count_as_their_weights_say(inputs_dtype: torch.dtype, *, powers_of_two: bool) -> None:
    inputs = torch.randn(3, 200, 40, generator=torch.Generator().manual_seed(0)).to(inputs_dtype)
    weights = torch.rand(3, 200, generator=torch.Generator().manual_seed(1))
    weights = weights.log2().round().exp2() if powers_of_two else weights
    weights[1, 7] = 0
    inputs[1, 7] = torch.nan
    hessian = miniquant.hessian_update_(torch.eye(40), inputs, token_weights=weights)
    wide = (inputs.nan_to_num().double() * weights.double().sqrt().unsqueeze(-1)).view(-1, 40)
    expected = torch.eye(40, dtype=torch.float64) + wide.mT @ wide
    # one rounding of the product with a weight, or of its square root, beside those of the sum
    eps = torch.finfo(torch.float32).eps
    assert bool(
        ((hessian - expected).abs() <= bound(torch.eye(40), wide.float()) + 2 * eps * wide.abs().mT @ wide.abs()).all()
    )


def test_leading_dimensions_are_tokens() -> None:
    inputs = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = miniquant.hessian_update_(torch.zeros(8, 8, dtype=torch.float64), inputs.view(-1, 8))
    for view in (inputs, inputs.view(6, 5, 8), inputs.view(5, 6, 8)):
        assert torch.equal(miniquant.hessian_update_(torch.zeros(8, 8, dtype=torch.float64), view), expected)
    one = miniquant.hessian_update_(torch.zeros(8, 8, dtype=torch.float64), inputs[0, 0, 0])
    assert torch.equal(one, torch.outer(inputs[0, 0, 0], inputs[0, 0, 0]))


@pytest.mark.parametrize("layout", ["transposed", "strided", "padded"])
def test_layouts_do_not_matter(layout: str) -> None:
    inputs = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    expected = miniquant.hessian_update_(torch.ones(12, 12), inputs)
    view = oracle.awkward_layouts(inputs)[layout]
    hessian = oracle.awkward_layouts(torch.ones(12, 12))[layout]
    storage_before = hessian.data_ptr()
    assert torch.equal(miniquant.hessian_update_(hessian, view), expected)
    assert torch.equal(hessian, expected)
    assert hessian.data_ptr() == storage_before
    assert torch.equal(view, inputs)


def test_writes_inside_a_view_only() -> None:
    base = torch.zeros(6, 6)
    miniquant.hessian_update_(base[1:4, 1:4], torch.ones(2, 3))
    expected = torch.zeros(6, 6)
    expected[1:4, 1:4] = 2
    assert torch.equal(base, expected)


def test_autograd_sees_the_change_and_records_nothing() -> None:
    hessian = torch.zeros(3, 3)
    version = hessian._version
    result = miniquant.hessian_update_(hessian, torch.ones(2, 3, requires_grad=True))
    assert not result.requires_grad
    assert hessian._version > version


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)])
def test_no_tokens_change_nothing(shape: tuple[int, ...]) -> None:
    hessian = torch.eye(4)
    assert torch.equal(miniquant.hessian_update_(hessian, torch.empty(shape)), torch.eye(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("splits", [[1000], [1, 999], [500, 500], [0, 300, 700], [7] * 142 + [6]], ids=len)
def test_any_split_gives_the_same_hessian(splits: list[int], dtype: torch.dtype) -> None:
    inputs = torch.randn(1000, 33, generator=torch.Generator().manual_seed(4), dtype=dtype)
    accumulator = miniquant.HessianAccumulator(33, dtype=dtype)
    for batch in inputs.split(splits):
        accumulator.update(batch[:, None])
    assert accumulator.tokens == 1000
    cast = inputs.double()
    expected = cast.mT @ cast / 1000
    error = (accumulator.hessian().double() - expected).abs()
    assert bool((error <= bound(torch.zeros(33, 33, dtype=dtype), inputs) / 1000).all())
    # Much closer than the bound: with partial sums the error does not grow with the number of tokens.
    assert error.max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()


def test_the_accumulators_hessian_is_a_new_tensor() -> None:
    accumulator = miniquant.HessianAccumulator(2)
    accumulator.update(torch.ones(4, 2))
    first = accumulator.hessian()
    assert torch.equal(first, torch.ones(2, 2))
    first.zero_()
    accumulator.update(torch.zeros(4, 2))
    assert torch.equal(accumulator.hessian(), torch.full((2, 2), 0.5))


def test_the_accumulator_names_what_it_wants() -> None:
    with pytest.raises(ValueError, match="expected at least one token before hessian"):
        miniquant.HessianAccumulator(2).hessian()
    with pytest.raises(ValueError, match="expected in_features to be at least 0, but got -1"):
        miniquant.HessianAccumulator(-1)
    with pytest.raises(TypeError, match=r"expected dtype to be float32 or float64, but got float16"):
        miniquant.HessianAccumulator(2, dtype=torch.float16)
    accumulator = miniquant.HessianAccumulator(2)
    with pytest.raises(ValueError, match=r"expected inputs to have shape \[\.\.\., K\] = \[\.\.\., 2\]"):
        accumulator.update(torch.ones(4, 3))
    assert accumulator.tokens == 0
