"""gptq and gptq_reference: the oracle's codes in float64, its loss in float32, and right answers for awkward inputs."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch

import miniquant
import oracle

HALF_TYPES = [torch.bfloat16, torch.float16]
GPTQS = [miniquant.gptq, miniquant.gptq_reference]
GPTQ_IDS = ["gptq", "gptq_reference"]

# (rows, columns): one of each; a row; a column; fewer columns than a vector; one more than a multiple of a vector; more
# rows than a panel, not a multiple of a tile.
SHAPES = [(1, 1), (1, 65), (3, 1), (5, 7), (33, 96), (101, 131)]

# The reference has loops instead of tiles.
REFERENCE_SHAPES = [(1, 1), (5, 7), (9, 65)]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"group_size": 1},
    {"group_size": 7, "block_size": 5},  # groups and blocks that start at different columns
    {"group_size": -1, "block_size": 16},  # a group longer than its blocks
    {"group_size": 1000, "block_size": 1000},
    {"bits": 2, "group_size": 32},
    {"bits": 3, "group_size": 32, "symmetric": False},
    {"bits": 8, "group_size": 48, "symmetric": False, "block_size": 32},
    {"column_order": "activation", "group_size": 16},
    {"column_order": "activation", "group_size": -1, "symmetric": False, "block_size": 9},
    {"group_scales": "dynamic", "group_size": 16, "block_size": 64},
    {"group_scales": "dynamic", "group_size": 24, "block_size": 7},  # a group longer than its blocks
    {"group_scales": "dynamic", "group_size": 10, "block_size": 32, "symmetric": False, "bits": 5},  # not a divisor
    {"group_scales": "dynamic", "group_size": -1},
    {"ridge": 1.0},
    {"ridge": 1e-4},
]


def oracle_options(options: dict[str, Any]) -> dict[str, Any]:
    """The oracle has no blocks."""
    return {key: value for key, value in options.items() if key != "block_size"}


def damped_loss(
    weight: torch.Tensor, hessian: torch.Tensor, result: miniquant.GptqResult, group_size: int = 64, ridge: float = 0.01
) -> torch.Tensor:
    """e H e^T per row in float64, from the result's codes and the scales as they are stored."""
    values = torch.from_numpy(oracle.dequantize(result.codes, result.scales, result.zero_points, group_size))
    error = weight.detach().double() - values
    return torch.from_numpy(oracle.quadratic_form(error.numpy(), oracle.damp(hessian, ridge).numpy()))


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
@pytest.mark.parametrize("options", OPTIONS, ids=oracle.option_id)
def test_the_oracles_codes_in_float64(gptq: Any, options: dict[str, Any]) -> None:
    for rows, columns in SHAPES if gptq is miniquant.gptq else REFERENCE_SHAPES:
        weight, hessian = oracle.layer(rows, columns, 2 * columns)
        actual = gptq(weight, hessian, **options)
        expected = oracle.gptq(weight, hessian, **oracle_options(options))
        # The oracle's tolerance allows for ties; on random weights there are none.
        assert oracle.assert_same_codes(actual.codes, expected, zero_points=actual.zero_points) == 0, (rows, columns)
        assert torch.equal(actual.zero_points, expected.zero_points)
        if options.get("group_scales") == "dynamic":
            torch.testing.assert_close(actual.scales, expected.scales, rtol=expected.tie_tolerance, atol=0.0)
        else:
            assert torch.equal(actual.scales, expected.scales), "static scales are the definition's, bit for bit"
        # Losses of the same codes, relative to the row with the largest.
        torch.testing.assert_close(
            actual.row_loss,
            torch.from_numpy(expected.row_loss),
            rtol=expected.tie_tolerance,
            atol=expected.tie_tolerance * float(np.max(expected.row_loss)) + expected.loss_rounding,
        )


@pytest.mark.parametrize("options", OPTIONS, ids=oracle.option_id)
def test_the_references_codes_in_float64(options: dict[str, Any]) -> None:
    """The operators against each other, with fewer tokens than columns as in the lab: without a ridge H is singular."""
    weight, hessian = oracle.layer(101, 131, 40, seed=5)
    fast = miniquant.gptq(weight, hessian, **options)
    reference = miniquant.gptq_reference(weight, hessian, **options)
    expected = oracle.gptq(weight, hessian, **oracle_options(options))
    assert oracle.assert_same_codes(fast.codes, expected, zero_points=fast.zero_points) == 0
    assert torch.equal(fast.codes, reference.codes)
    assert torch.equal(fast.zero_points, reference.zero_points)
    tolerance = expected.tie_tolerance
    torch.testing.assert_close(fast.scales, reference.scales, rtol=tolerance, atol=0.0)
    torch.testing.assert_close(fast.row_loss, reference.row_loss, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
@pytest.mark.parametrize("options", OPTIONS, ids=oracle.option_id)
def test_the_oracles_loss_in_float32(gptq: Any, options: dict[str, Any]) -> None:
    rows = 101 if gptq is miniquant.gptq else 40
    weight, hessian = oracle.layer(rows, 131, 262, dtype=torch.float32)
    actual = gptq(weight, hessian, **options)
    expected = oracle.gptq(weight, hessian, **oracle_options(options))
    group_size, ridge = options.get("group_size", 64), options.get("ridge", 0.01)
    if options.get("group_scales") != "dynamic":
        assert torch.equal(actual.scales, expected.scales)
        assert torch.equal(actual.zero_points, expected.zero_points)
    assert actual.row_loss.dtype == torch.float32
    loss = damped_loss(weight, hessian, actual, group_size, ridge)
    # A dynamic zero point near a tie changes every code of its group; a scale computed from the wrong weights changes
    # the loss by tens of percent.
    tolerance = 5e-3 if options.get("group_scales") == "dynamic" else 1e-3
    assert abs(float(loss.sum()) / float(expected.row_loss.sum()) - 1) <= tolerance
    # A target changes by about the condition number of H times float32's eps; few codes are that near a tie.
    assert (actual.codes != expected.codes).double().mean() <= 5e-3


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_half_types_are_computed_in_float32_with_the_rounded_scales(
    symmetric: bool, dtype: torch.dtype, gptq: Any
) -> None:
    weight, hessian = oracle.layer(65, 96, 300, dtype=dtype)
    result = gptq(weight, hessian, group_size=32, symmetric=symmetric)
    _, scales, zero_points = oracle.rtn(weight, group_size=32, symmetric=symmetric)
    assert result.scales.dtype == dtype
    assert result.row_loss.dtype == torch.float32
    assert torch.equal(result.scales, scales)
    assert torch.equal(result.zero_points, zero_points)
    # Bit for bit as a float32 weight with given scales: nothing else is rounded to the half type.
    given = {"scales": scales.float(), "zero_points": zero_points}
    same = gptq(weight.float(), hessian, group_size=32, symmetric=symmetric, **given)
    assert torch.equal(result.codes, same.codes)
    assert torch.equal(result.row_loss, same.row_loss)
    expected = oracle.gptq(weight, hessian, group_size=32, symmetric=symmetric)
    loss = damped_loss(weight, hessian, result, group_size=32)
    assert abs(float(loss.sum()) / float(expected.row_loss.sum()) - 1) <= 1e-3


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_dynamic_scales_are_rounded_too(dtype: torch.dtype, gptq: Any) -> None:
    weight, hessian = oracle.layer(17, 64, 200, dtype=dtype)
    result = gptq(weight, hessian, group_size=16, group_scales="dynamic")
    assert result.scales.dtype == dtype
    # The codes were chosen with the returned scales, so their loss is the reported one.
    torch.testing.assert_close(
        result.row_loss.double(), damped_loss(weight, hessian, result, group_size=16), rtol=1e-4, atol=0.0
    )


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
@pytest.mark.parametrize("hessian_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF_TYPES], ids=str)
def test_any_pair_of_dtypes(dtype: torch.dtype, hessian_dtype: torch.dtype, gptq: Any) -> None:
    weight, hessian = oracle.layer(9, 40, 100)
    weight, hessian = weight.to(dtype), hessian.to(hessian_dtype)
    result = gptq(weight, hessian, group_size=16)
    assert result.scales.dtype == dtype
    assert result.row_loss.dtype == oracle.compute_dtype(dtype)
    torch.testing.assert_close(
        result.row_loss.double(), damped_loss(weight, hessian, result, group_size=16), rtol=1e-4, atol=0.0
    )


# The lab, computed in float64 by another implementation: loss of RTN, loss of GPTQ, share of codes that differ.
LAB = {"normal": (2.766669, 0.303847, 0.16087), "cauchy": (105127.2, 39725.6, 0.265)}


@pytest.mark.parametrize("distribution", ["normal", "cauchy"])
def test_the_lab(distribution: Literal["normal", "cauchy"]) -> None:
    problem = oracle.lab(distribution)
    weight, hessian = problem.weight, problem.hessian
    damped = oracle.damp(hessian, 0.01)
    rounded = miniquant.rtn(weight)
    result = miniquant.gptq(weight, hessian)
    loss_rtn = float(miniquant.quantization_loss(weight, miniquant.dequantize(rounded), damped).sum())
    loss_gptq = float(miniquant.quantization_loss(weight, miniquant.dequantize(result), damped).sum())
    changed = float((result.codes != rounded.codes).double().mean())
    expected_rtn, expected_gptq, expected_changed = LAB[distribution]
    assert loss_rtn == pytest.approx(expected_rtn, rel=1e-3)
    assert loss_gptq == pytest.approx(expected_gptq, rel=1e-2)
    assert changed == pytest.approx(expected_changed, rel=1e-2)
    assert loss_gptq < 0.7 * loss_rtn, "the lab's stop condition"
    # The reported loss is the loss of the codes.
    assert float(result.row_loss.double().sum()) == pytest.approx(loss_gptq, rel=1e-4)
    # Codes of the lab stay in [-7, 7].
    assert (int(result.codes.min()), int(result.codes.max())) == (-7, 7)


def test_the_labs_gptq_is_worse_than_rtn_on_fresh_inputs() -> None:
    """128 tokens say nothing about 768 dimensions."""
    problem = oracle.lab("normal")
    losses = [
        float(
            miniquant.quantization_loss(
                problem.weight, miniquant.dequantize(codes, scales, zero_points, 64), problem.fresh_hessian
            ).sum()
        )
        for codes, scales, zero_points, *_ in (
            miniquant.rtn(problem.weight),
            miniquant.gptq(problem.weight, problem.hessian),
        )
    ]
    assert losses == pytest.approx([2.7304, 5.1410], rel=1e-2)


def test_the_lab_in_float64_is_the_oracle_code_for_code() -> None:
    problem = oracle.lab("normal")
    weight, hessian = problem.weight.double(), problem.hessian.double()
    result = miniquant.gptq(weight, hessian)
    assert oracle.assert_same_codes(result.codes, oracle.gptq(weight, hessian)) == 0


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
@pytest.mark.parametrize("ridge", [0.01, 0.0])
@pytest.mark.parametrize("column_order", ["natural", "activation"])
def test_dead_inputs_are_rounded_to_nearest(column_order: str, ridge: float, gptq: Any) -> None:
    dead = [0, 5, 6, 38, 39]
    weight, _ = oracle.layer(9, 40, 1)
    inputs = torch.randn(200, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs[:, dead] = 0
    hessian = inputs.mT @ inputs / 200
    options: dict[str, Any] = {"group_size": 16, "column_order": column_order, "ridge": ridge}
    result = gptq(weight, hessian, **options)
    rounded = miniquant.rtn(weight, group_size=16)
    assert torch.equal(result.codes[:, dead], rounded.codes[:, dead])
    assert oracle.assert_same_codes(result.codes, oracle.gptq(weight, hessian, **options)) == 0
    # Their weights do not affect the others: with given scales the other columns alone give the same codes.
    alive = [column for column in range(40) if column not in dead]
    groups = torch.tensor([column // 16 for column in alive])
    alone = gptq(
        weight[:, alive],
        hessian[alive][:, alive],
        group_size=1,
        scales=rounded.scales[:, groups],
        column_order=column_order,
        ridge=ridge * len(alive) / 40,  # here the mean of the diagonal has no dead inputs
    )
    assert torch.equal(result.codes[:, alive], alone.codes)
    torch.testing.assert_close(result.row_loss, damped_loss(weight, hessian, result, 16, ridge), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
@pytest.mark.parametrize("ridge", [0.01, 0.0])
def test_inputs_that_are_all_dead(ridge: float, gptq: Any) -> None:
    weight, _ = oracle.layer(4, 20, 1)
    result = gptq(weight, torch.zeros(20, 20, dtype=torch.float64), group_size=8, ridge=ridge)
    assert oracle.same_bits(result.tensors[:3], miniquant.rtn(weight, group_size=8))
    assert not result.row_loss.any()


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
@pytest.mark.parametrize("group_scales", ["static", "dynamic"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_all_zero_groups(symmetric: bool, group_scales: str, gptq: Any) -> None:
    weight, hessian = oracle.layer(6, 48, 100)
    weight[:, 16:32] = 0
    weight[2] = 0
    options: dict[str, Any] = {"group_size": 16, "symmetric": symmetric, "group_scales": group_scales}
    result = gptq(weight, hessian, **options)
    assert bool(result.scales.isfinite().all())
    assert bool((result.scales > 0).all())
    expected = oracle.gptq(weight, hessian, **options)
    assert oracle.assert_same_codes(result.codes, expected, zero_points=result.zero_points) == 0
    assert torch.equal(result.codes[2], result.zero_points[2].repeat_interleave(16))
    assert float(result.row_loss[2]) == 0


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
@pytest.mark.parametrize("tokens", [1, 5, 63])
def test_fewer_tokens_than_columns(tokens: int, gptq: Any) -> None:
    weight, hessian = oracle.layer(12, 64, tokens)
    result = gptq(weight, hessian, group_size=16)
    assert oracle.assert_same_codes(result.codes, oracle.gptq(weight, hessian, group_size=16)) == 0


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
def test_one_column_is_rounded_to_nearest(gptq: Any) -> None:
    weight = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    hessian = torch.tensor([[3.0]], dtype=torch.float64)
    scales = torch.full((9, 1), 0.25, dtype=torch.float64)
    result = gptq(weight, hessian, scales=scales)
    assert torch.equal(result.codes, miniquant.rtn(weight, scales=scales).codes)
    torch.testing.assert_close(result.row_loss, damped_loss(weight, hessian, result), rtol=1e-14, atol=1e-18)


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF_TYPES], ids=str)
@pytest.mark.parametrize(("rows", "columns", "groups"), [(0, 1, 1), (0, 130, 3), (3, 0, 0), (0, 0, 0)])
def test_empty_weights(rows: int, columns: int, groups: int, dtype: torch.dtype, gptq: Any) -> None:
    for options in ({}, {"group_scales": "dynamic"}, {"column_order": "activation"}):
        codes, scales, zero_points, row_loss = gptq(
            torch.empty(rows, columns, dtype=dtype), torch.eye(columns), **options
        )
        assert codes.shape == (rows, columns)
        assert scales.shape == zero_points.shape == (rows, groups)
        assert row_loss.shape == (rows,)
        assert not row_loss.any()
        assert (codes.dtype, scales.dtype, zero_points.dtype) == (torch.int8, dtype, torch.int8)


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_layouts_do_not_matter_and_nothing_is_changed(dtype: torch.dtype, gptq: Any) -> None:
    weight, hessian = oracle.layer(13, 50, 120, dtype=dtype)
    scales = oracle.rtn(weight, group_size=20)[1]
    expected = gptq(weight, hessian, group_size=20)
    weights, hessians = oracle.awkward_layouts(weight), oracle.awkward_layouts(hessian)
    all_scales = oracle.awkward_layouts(scales)
    for name, view in weights.items():
        versions = [view._version, hessians[name]._version, all_scales[name]._version]
        assert oracle.same_bits(gptq(view, hessians[name], group_size=20), expected), name
        given = gptq(view, hessians[name], group_size=20, scales=all_scales[name])
        assert oracle.same_bits(given, expected), name
        assert [view._version, hessians[name]._version, all_scales[name]._version] == versions
        assert torch.equal(view, weight)
        assert torch.equal(hessians[name], hessian)
        assert torch.equal(all_scales[name], scales)


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
def test_nothing_is_recorded_for_autograd(gptq: Any) -> None:
    weight, hessian = oracle.layer(5, 32, 80, dtype=torch.float32)
    expected = gptq(weight, hessian)
    result = gptq(torch.nn.Parameter(weight), (hessian * 1).requires_grad_())
    assert not any(tensor.requires_grad for tensor in result)
    assert oracle.same_bits(result, expected)
    with torch.inference_mode():
        assert oracle.same_bits(gptq(weight + 0, hessian), expected)


def test_autocast_lowers_no_precision() -> None:
    weight, hessian = oracle.layer(64, 128, 300, dtype=torch.float32)
    inputs = torch.randn(300, 128)

    def results() -> tuple[torch.Tensor, ...]:
        nearest = miniquant.rtn(weight)
        values = miniquant.dequantize(nearest)
        return (
            *nearest,
            *miniquant.gptq(weight, hessian),
            *miniquant.gptq_reference(weight, hessian),
            miniquant.quantization_loss(weight, values, hessian),
            miniquant.hessian_update_(torch.zeros(128, 128), inputs),
            *torch.ops.miniquant.choose_ridge(weight, hessian, hessian + torch.eye(128), 300),
        )

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert oracle.same_bits(results(), expected)


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("column_order", ["natural", "activation"])
def test_given_scales(column_order: str, symmetric: bool, gptq: Any) -> None:
    weight, hessian = oracle.layer(11, 50, 120)
    _, scales, zero_points = oracle.rtn(weight, group_size=20, symmetric=symmetric)
    scales = scales * 0.8
    options: dict[str, Any] = {
        "group_size": 20,
        "symmetric": symmetric,
        "column_order": column_order,
        "scales": scales,
        "zero_points": zero_points,
    }
    result = gptq(weight, hessian, **options)
    assert torch.equal(result.scales, scales)
    assert torch.equal(result.zero_points, zero_points)
    assert result.scales.data_ptr() != scales.data_ptr()
    assert result.zero_points.data_ptr() != zero_points.data_ptr()
    assert oracle.assert_same_codes(result.codes, oracle.gptq(weight, hessian, **options)) == 0


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
def test_a_slightly_asymmetric_hessian_is_made_symmetric(gptq: Any) -> None:
    """A computed X X^T may differ from its transpose by rounding; both triangles count equally."""
    weight, hessian = oracle.layer(9, 30, 90)
    skewed = hessian.clone()
    skewed[3, 20] *= 1 + 1e-9
    expected = gptq(weight, (skewed + skewed.mT) / 2, group_size=10)
    assert oracle.same_bits(gptq(weight, skewed, group_size=10), expected)
    assert oracle.same_bits(gptq(weight, skewed.mT, group_size=10), expected)


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
def test_activation_order_breaks_ties_by_the_stored_order(gptq: Any) -> None:
    """With equal diagonal entries the result is that of the natural order."""
    correlation = torch.full((24, 24), 0.4, dtype=torch.float64) + 0.6 * torch.eye(24, dtype=torch.float64)
    weight, _ = oracle.layer(7, 24, 1)
    natural = gptq(weight, correlation, group_size=8)
    assert (natural.codes != miniquant.rtn(weight, group_size=8).codes).any()
    assert torch.equal(gptq(weight, correlation, group_size=8, column_order="activation").codes, natural.codes)


@pytest.mark.parametrize("gptq", GPTQS, ids=GPTQ_IDS)
def test_dynamic_scales_are_of_the_updated_weights(gptq: Any) -> None:
    """For any block size the scale of a group takes every earlier column into account, even if the group is longer."""
    weight, hessian = oracle.layer(21, 96, 300)
    options: dict[str, Any] = {"group_size": 48, "group_scales": "dynamic"}
    expected = oracle.gptq(weight, hessian, **options)
    static = miniquant.rtn(weight, group_size=48)
    for block_size in (1, 16, 48, 64, 96, 200):
        result = gptq(weight, hessian, block_size=block_size, **options)
        assert oracle.assert_same_codes(result.codes, expected) == 0, block_size
        torch.testing.assert_close(result.scales, expected.scales, rtol=expected.tie_tolerance, atol=0.0)
        assert torch.equal(result.scales[:, 0], static.scales[:, 0]), "nothing comes before the first group"
        assert ((result.scales[:, 1] / static.scales[:, 1] - 1).abs() > 1e-3).any()
