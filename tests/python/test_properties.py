"""Properties for any weight: blocks, threads, Hessians, orders and scales; the lab's pitfalls are detected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import miniquant
import oracle

# Reproducible, and bounded by the number of examples rather than by the machine's speed.
hypothesis.settings.register_profile("miniquant", deadline=None, derandomize=True, max_examples=40, database=None)
hypothesis.settings.load_profile("miniquant")


@st.composite
def grids(draw: st.DrawFn) -> dict[str, Any]:
    """Bits, group size, symmetric."""
    return {
        "bits": draw(st.integers(2, 8)),
        "group_size": draw(st.one_of(st.just(-1), st.integers(1, 70))),
        "symmetric": draw(st.booleans()),
    }


@st.composite
def all_options(draw: st.DrawFn) -> dict[str, Any]:
    """Every option of gptq but block_size."""
    order, scales = draw(st.sampled_from([("natural", "static"), ("activation", "static"), ("natural", "dynamic")]))
    ridge = draw(st.sampled_from([0.01, 0.1, 1.0]))
    return {**draw(grids()), "column_order": order, "group_scales": scales, "ridge": ridge}


@st.composite
def layers(draw: st.DrawFn, max_rows: int = 20, max_columns: int = 70) -> tuple[Tensor, Tensor]:
    """A weight and its Hessian in float64, with more tokens than columns or fewer."""
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    tokens = draw(st.integers(1, 2 * columns))
    return oracle.layer(rows, columns, tokens, seed=draw(st.integers(0, 1000)), correlated=draw(st.booleans()))


def damped_loss(weight: Tensor, hessian: Tensor, grid: Iterable[Tensor], group_size: int, ridge: float) -> Tensor:
    """quantization_loss of codes, scales and zero points with the damped Hessian."""
    codes, scales, zero_points = list(grid)[:3]
    compute = oracle.compute_dtype(weight.dtype)
    values = miniquant.dequantize(codes, scales.to(compute), zero_points, group_size)
    return miniquant.quantization_loss(weight.to(compute), values, oracle.damp(hessian, ridge))


@hypothesis.given(layers(), all_options(), st.integers(1, 80))
def test_the_oracles_codes_for_any_shape_and_options(
    layer: tuple[Tensor, Tensor], options: dict[str, Any], block_size: int
) -> None:
    expected = oracle.gptq(*layer, **options)
    result = miniquant.gptq(*layer, block_size=block_size, **options)
    oracle.assert_same_codes(result.codes, expected, zero_points=result.zero_points)


@hypothesis.given(layers(max_rows=6, max_columns=40), all_options(), st.integers(1, 50))
@hypothesis.settings(max_examples=20)
def test_the_oracles_codes_from_the_reference(
    layer: tuple[Tensor, Tensor], options: dict[str, Any], block_size: int
) -> None:
    expected = oracle.gptq(*layer, **options)
    result = miniquant.gptq_reference(*layer, block_size=block_size, **options)
    oracle.assert_same_codes(result.codes, expected, zero_points=result.zero_points)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@hypothesis.given(st.data(), all_options())
@hypothesis.settings(max_examples=25)
def test_the_block_size_does_not_change_the_codes(
    dtype: torch.dtype, data: st.DataObject, options: dict[str, Any]
) -> None:
    weight, hessian = data.draw(layers())
    weight = weight.to(dtype)
    expected = miniquant.gptq(weight, hessian, block_size=weight.shape[1] + 1, **options)
    for block_size in (1, 7, 32, 128):
        result = miniquant.gptq(weight, hessian, block_size=block_size, **options)
        assert oracle.same_bits(result.tensors[:3], expected.tensors[:3])
        # The loss of a row is summed strip by strip, and strips start where blocks do.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(result.row_loss, expected.row_loss, rtol=2 * weight.shape[1] * eps, atol=0.0)


@pytest.mark.parametrize("options", [{}, {"column_order": "activation"}, {"group_scales": "dynamic"}], ids=str)
def test_the_block_size_does_not_change_the_labs_codes(options: dict[str, Any]) -> None:
    problem = oracle.lab("normal")
    weight, hessian = problem.weight.double(), problem.hessian
    expected = miniquant.gptq(weight, hessian, block_size=769, **options)
    for block_size in (1, 7, 32, 128):
        assert torch.equal(miniquant.gptq(weight, hessian, block_size=block_size, **options).codes, expected.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"column_order": "activation", "block_size": 33},
        {"group_scales": "dynamic", "symmetric": False, "group_size": 40},
        {"group_size": -1, "block_size": 1},
    ],
    ids=oracle.option_id,
)
def test_the_number_of_threads_does_not_change_a_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    # More panels of rows than threads, the last one short; a factorization of several blocks.
    weight, hessian = oracle.layer(300, 300, 500, dtype=dtype)
    inputs = torch.randn(700, 300, generator=torch.Generator().manual_seed(1), dtype=hessian.dtype)
    outputs: list[tuple[Tensor, ...]] = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        result = miniquant.gptq(weight, hessian, **options)
        rounded = miniquant.rtn(weight)
        values = miniquant.dequantize(result)
        loss = miniquant.quantization_loss(weight, values, hessian)
        summed = miniquant.hessian_update_(torch.zeros_like(hessian), inputs)
        outputs.append((*result, *rounded, values, loss, summed))
    assert oracle.same_bits(outputs[1], outputs[0])
    assert oracle.same_bits(outputs[2], outputs[0])


@hypothesis.given(layers(), all_options(), st.sampled_from([1.0, 0.25, 3.0, 1e-6, 7e5]))
def test_a_multiple_of_the_identity_gives_rtn(layer: tuple[Tensor, Tensor], options: dict[str, Any], c: float) -> None:
    for dtype in (torch.float32, torch.float64):
        weight = layer[0].to(dtype)
        hessian = torch.eye(weight.shape[1], dtype=dtype) * c
        grid = {key: options[key] for key in ("bits", "group_size", "symmetric")}
        for gptq in (miniquant.gptq, miniquant.gptq_reference):
            assert oracle.same_bits(gptq(weight, hessian, **options).tensors[:3], miniquant.rtn(weight, **grid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@hypothesis.given(st.data(), all_options())
def test_rows_are_independent(dtype: torch.dtype, data: st.DataObject, options: dict[str, Any]) -> None:
    """A row's result is the same, bit for bit, in any position, alone or with other rows."""
    weight, hessian = data.draw(layers(max_rows=40))
    weight = weight.to(dtype)
    rows = torch.tensor(data.draw(st.permutations(range(weight.shape[0]))))
    result = miniquant.gptq(weight, hessian, **options)
    assert oracle.same_bits(miniquant.gptq(weight[rows], hessian, **options), tuple(tensor[rows] for tensor in result))
    row = slice(int(rows[0]), int(rows[0]) + 1)
    assert oracle.same_bits(miniquant.gptq(weight[row], hessian, **options), tuple(tensor[row] for tensor in result))


@hypothesis.given(layers(), all_options())
def test_row_loss_is_the_quantization_loss(layer: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
    weight, hessian = layer
    group_size, ridge = options["group_size"], options["ridge"]
    for gptq in (miniquant.gptq, miniquant.gptq_reference):
        result = gptq(weight, hessian, **options)
        expected = damped_loss(weight, hessian, result, group_size, ridge)
        # The error of a weight that is nearly on its grid is known to eps of the weight, not of the error.
        floor = oracle.gptq(weight, hessian, **options).loss_rounding
        torch.testing.assert_close(result.row_loss, expected, rtol=1e-9, atol=floor)


def test_row_loss_is_the_quantization_loss_in_float32() -> None:
    weight, hessian = oracle.layer(101, 131, 300, dtype=torch.float32)
    for options in ({}, {"group_scales": "dynamic"}, {"column_order": "activation", "symmetric": False}):
        result = miniquant.gptq(weight, hessian, **options)
        expected = damped_loss(weight, hessian, result, 64, 0.01)
        # 131 squares, each of a target known to some tens of float32's eps relative to its step.
        torch.testing.assert_close(result.row_loss, expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("distribution", ["normal", "cauchy"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_never_above_rtn_on_the_lab(bits: int, symmetric: bool, distribution: Literal["normal", "cauchy"]) -> None:
    problem = oracle.lab(distribution)
    weight, hessian = problem.weight[:96], problem.hessian
    rounded = miniquant.rtn(weight, bits=bits, symmetric=symmetric)
    loss_rtn = damped_loss(weight, hessian, rounded, 64, 0.01)
    for order in ("natural", "activation"):
        loss = miniquant.gptq(weight, hessian, bits=bits, symmetric=symmetric, column_order=order).row_loss
        assert loss.sum() < loss_rtn.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@hypothesis.given(st.data(), all_options(), st.integers(-20, 20))
def test_powers_of_two_scale_exactly(
    dtype: torch.dtype, data: st.DataObject, options: dict[str, Any], exponent: int
) -> None:
    weight, hessian = data.draw(layers())
    weight, factor = weight.to(dtype), 2.0**exponent
    expected = miniquant.gptq(weight, hessian, **options)
    of_weight = miniquant.gptq(weight * factor, hessian, **options)
    assert torch.equal(of_weight.codes, expected.codes)
    assert torch.equal(of_weight.scales, expected.scales * factor)
    assert torch.equal(of_weight.row_loss, expected.row_loss * factor**2)
    of_hessian = miniquant.gptq(weight, hessian * factor**2, **options)
    assert torch.equal(of_hessian.codes, expected.codes)
    assert torch.equal(of_hessian.scales, expected.scales)
    assert torch.equal(of_hessian.row_loss, expected.row_loss * factor**2)


@hypothesis.given(layers(), st.data())
def test_activation_order_is_the_natural_order_of_permuted_columns(
    layer: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    """With one group per row, a permutation of columns does not change scales."""
    weight, hessian = layer
    order = hessian.diagonal().argsort(stable=True, descending=True)
    options: dict[str, Any] = {"group_size": -1, "bits": data.draw(st.integers(2, 8))}
    permuted = miniquant.gptq(weight[:, order], hessian[order][:, order], **options)
    result = miniquant.gptq(weight, hessian, column_order="activation", **options)
    expected = oracle.gptq(weight, hessian, column_order="activation", **options)
    oracle.assert_same_codes(result.codes, expected)
    oracle.assert_same_codes(permuted.codes[:, order.argsort()], expected)


@hypothesis.given(layers(), grids())
def test_dynamic_scales_of_a_single_group_are_static(layer: tuple[Tensor, Tensor], grid: dict[str, Any]) -> None:
    """No column is updated before the only group starts."""
    grid["group_size"] = -1
    static = miniquant.gptq(*layer, **grid)
    dynamic = miniquant.gptq(*layer, group_scales="dynamic", **grid)
    assert torch.equal(static.scales, dynamic.scales)
    assert torch.equal(static.zero_points, dynamic.zero_points)
    oracle.assert_same_codes(dynamic.codes, oracle.gptq(*layer, **grid))


@hypothesis.given(layers(), grids())
def test_a_weight_on_its_grid_is_left_alone(layer: tuple[Tensor, Tensor], grid: dict[str, Any]) -> None:
    """Quantizing a dequantized weight gives the same codes and, except for rounding, a loss of 0."""
    weight, hessian = layer
    codes, scales, zero_points = miniquant.rtn(weight, **grid)
    on_grid = miniquant.dequantize(codes, scales, zero_points, grid["group_size"])
    again = miniquant.gptq(on_grid, hessian, scales=scales, zero_points=zero_points, **grid)
    assert torch.equal(again.codes, codes)
    assert not again.row_loss.any()


@hypothesis.given(st.integers(0, 20), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_packing_round_trips(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = miniquant.pack_int4(codes)
    assert packed.shape == (rows, (columns + 1) // 2)
    assert torch.equal(miniquant.unpack_int4(packed, columns), codes)


@hypothesis.given(layers(), grids(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_rtn_is_the_definition(layer: tuple[Tensor, Tensor], grid: dict[str, Any], dtype: torch.dtype) -> None:
    weight = layer[0].to(dtype)
    assert oracle.same_bits(miniquant.rtn(weight, **grid), oracle.rtn(weight, **grid))


@hypothesis.given(st.lists(st.integers(0, 400), min_size=1, max_size=5), st.integers(1, 40))
def test_any_split_of_the_tokens_gives_the_same_hessian(splits: list[int], columns: int) -> None:
    inputs = torch.randn(sum(splits), columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = torch.zeros(columns, columns, dtype=torch.float64)
    for batch in inputs.split(splits):
        miniquant.hessian_update_(hessian, batch)
    # Sums of n products in any order: (n + 1) eps |X|^T |X| (Higham), here against one of the same precision.
    bound = 2 * (len(inputs) + 1) * torch.finfo(torch.float64).eps * (inputs.abs().mT @ inputs.abs())
    assert bool(((hessian - inputs.mT @ inputs).abs() <= bound).all())


MUTATIONS = [mutation for mutation in get_args(oracle.Mutation) if mutation != "none"]


@pytest.mark.parametrize("gptq", [miniquant.gptq, miniquant.gptq_reference], ids=["gptq", "gptq_reference"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_labs_pitfalls_would_be_seen(mutation: oracle.Mutation, gptq: Any) -> None:
    """The comparison that the operators pass fails for an algorithm with one of the lab's bugs."""
    weight, hessian = oracle.layer(24, 64, 48, seed=7)
    result = gptq(weight, hessian, group_size=16)
    assert oracle.assert_same_codes(result.codes, oracle.gptq(weight, hessian, group_size=16)) == 0
    broken = oracle.gptq(weight, hessian, group_size=16, mutation=mutation)
    with pytest.raises(AssertionError, match="codes differ"):
        oracle.assert_same_codes(result.codes, broken)
    # The loss shows it, too: on the calibration inputs it is below that of the algorithm with the bug.
    assert float(result.row_loss.sum()) < 0.9 * float(broken.row_loss.sum())


def test_the_wrong_triangle_is_a_silent_no_op() -> None:
    """The lab's `cholesky(inverse(H))`, the lower factor, gives rounding to nearest."""
    weight, hessian = oracle.layer(8, 32, 64)
    broken = oracle.gptq(weight, hessian, group_size=16, mutation="wrong triangle")
    assert torch.equal(broken.codes, miniquant.rtn(weight, group_size=16).codes)


def test_the_wrong_sign_is_worse_than_rtn() -> None:
    weight, hessian = oracle.layer(24, 64, 48, seed=7)
    broken = oracle.gptq(weight, hessian, group_size=16, mutation="wrong sign")
    rounded = damped_loss(weight, hessian, miniquant.rtn(weight, group_size=16), 16, 0.01)
    assert float(broken.row_loss.sum()) > float(rounded.sum())


def test_a_code_far_from_any_tie_is_not_excused() -> None:
    weight, hessian = oracle.layer(3, 16, 40)
    expected = oracle.gptq(weight, hessian)
    changed = expected.codes.clone()
    changed[1, 9] += 1 if changed[1, 9] < 7 else -1
    with pytest.raises(AssertionError, match="row 1: 1 codes differ; the first, in column 9"):
        oracle.assert_same_codes(changed, expected)


def test_a_tie_is_excused_and_what_follows_it_in_its_row() -> None:
    """At level 2.5 both neighbours, and the codes that follow from either, are accepted; other rows are compared."""
    hessian = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[2.5, 1.2], [1.0, 1.0]], dtype=torch.float64)
    expected = oracle.gptq(weight, hessian, scales=torch.ones(2, 1, dtype=torch.float64))
    assert float(expected.tie_distance[0, 0]) == 0
    other = expected.codes.clone()
    other[0] = torch.tensor([3, 1])
    assert oracle.assert_same_codes(other, expected) == 1
    other[1, 0] += 1
    with pytest.raises(AssertionError, match="row 1"):
        oracle.assert_same_codes(other, expected)
