"""Properties for any finite input: the scale of H and W, dead inputs, losses of at least 0, scales without overflow."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import miniquant
import oracle

hypothesis.settings.register_profile("numerics", deadline=None, derandomize=True, max_examples=40, database=None)
hypothesis.settings.load_profile("numerics")

OPS = torch.ops.miniquant
LOSS_SCALES: dict[str, Any] = {"scale_method": "loss", "group_scales": "dynamic", "column_order": "group"}
# The options of the three presets, for either kind of grid, and other options that search for scales or change codes.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dynamic": {"group_scales": "dynamic"},
    "fast": {"full_range": True, "scale_method": "mse", "column_order": "activation"},
    "hessian": {"scale_method": "hessian"},
    "loss": LOSS_SCALES,
    "refined": {"refine": 3},
    "best": {"full_range": True, **LOSS_SCALES, "beam_scales": 2, "refine": 2},
}
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS)


def options_of(setting: str, *, symmetric: bool) -> dict[str, Any]:
    options = {**SETTINGS[setting], "symmetric": symmetric}
    return options if symmetric else {key: value for key, value in options.items() if key != "full_range"}


def damped_loss(weight: Tensor, hessian: Tensor, result: Any, ridge: float, group_size: int = 64) -> Tensor:
    """e H e^T per row in float64, in the units of the arguments."""
    values = miniquant.dequantize(result[0], result[1].double(), result[2], group_size)
    return miniquant.quantization_loss(weight.double(), values, oracle.damp(hessian.double(), ridge))


def whole_numbers(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight and a positive definite Hessian of few significant bits: exact at any scale in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-100, 101, (rows, columns), generator=generator).double()
    inputs = torch.randint(-1, 2, (columns + 5, columns), generator=generator).double()
    return weight, inputs.mT @ inputs


# --- the scale of H ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@EVERY_SETTING
def test_a_power_of_four_times_the_hessian_changes_no_bit(setting: str, symmetric: bool, dtype: torch.dtype) -> None:
    weight, hessian = whole_numbers(9, 70, 1)
    options = options_of(setting, symmetric=symmetric)
    for of_weight in (torch.float32, torch.bfloat16, torch.float64):
        w, h = weight.to(of_weight), hessian.to(dtype)
        expected = OPS.gptq(w, h, bits=3, group_size=32, **options)
        for exponent in (-140, -100, -30, 30, 100):
            result = OPS.gptq(w, h * 2.0**exponent, bits=3, group_size=32, **options)
            assert oracle.same_bits(result[:3], expected[:3]), exponent
            held = expected[3].double() * 2.0**exponent
            # Rounded once more if the number is subnormal in float32.
            torch.testing.assert_close(result[3].double(), held.to(result[3].dtype).double(), rtol=0, atol=0)


@EVERY_SETTING
def test_a_float64_hessian_at_the_ends_of_its_range(setting: str) -> None:
    weight, hessian = whole_numbers(5, 40, 2)
    options = options_of(setting, symmetric=True)
    expected = OPS.gptq(weight, hessian, **options)
    for exponent in (-1000, -600, 600, 980):
        result = OPS.gptq(weight, hessian * 2.0**exponent, **options)
        assert oracle.same_bits(result[:3], expected[:3]), exponent
        assert torch.equal(result[3], expected[3] * 2.0**exponent), exponent


@hypothesis.given(st.integers(0, 1000), st.integers(1, 40), st.floats(1e-40, 1e40), st.sampled_from(list(SETTINGS)))
def test_any_positive_constant_times_the_hessian_gives_the_same_codes(
    seed: int, columns: int, constant: float, setting: str
) -> None:
    """Equal except for ties, which rounding may break either way; rows with ties have equal losses."""
    weight, hessian = oracle.layer(4, columns, 2 * columns + 3, seed=seed)
    options = options_of(setting, symmetric=True)
    expected = OPS.gptq(weight, hessian, **options)
    result = OPS.gptq(weight, hessian * constant, **options)
    same = result[0].eq(expected[0]).all(1)
    torch.testing.assert_close(result[3] / constant, expected[3], rtol=1e-6, atol=1e-14)
    assert bool(same.all()) or bool((~same).sum() <= 1)


def test_the_codes_of_a_hessian_that_float32_cannot_hold() -> None:
    weight = torch.tensor([[1.0, 0.4]])
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    best = options_of("best", symmetric=True)
    expected = OPS.gptq(weight, hessian, **best)
    assert expected[3].item() > 0
    for constant in (1e-46, 1e-60, 1e-300, 1e30):
        result = OPS.gptq(weight, hessian * constant, **best)
        assert oracle.same_bits(result[:3], expected[:3])
        assert result[3].item() >= 0
        # float32 rounds the loss, to 0 if it is small enough.
        assert result[3].item() == pytest.approx(expected[3].item() * constant, rel=1e-6, abs=2e-45)
    in_float64 = OPS.gptq(weight.double(), hessian * 1e-46, **best)
    assert in_float64[3].item() == pytest.approx(OPS.gptq(weight.double(), hessian, **best)[3].item() * 1e-46, rel=1e-9)


def test_a_row_loss_too_large_for_its_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"whose products are finite in float32.*but got a row loss that is not"):
        OPS.gptq(torch.tensor([[1.0, 0.4]]), torch.eye(2, dtype=torch.float64) * 1e60)


@hypothesis.given(st.integers(-120, 100))
@hypothesis.settings(max_examples=10)
def test_the_reference_takes_any_scale_too(exponent: int) -> None:
    weight, hessian = whole_numbers(4, 30, 3)
    for w, h in ((weight.float(), hessian.float()), (weight, hessian)):
        expected = OPS.gptq_reference(w, h)
        result = OPS.gptq_reference(w, h * 2.0**exponent)
        assert oracle.same_bits(result[:3], expected[:3])
        smaller = OPS.gptq_reference(w * 2.0 ** (exponent // 2), h)
        assert torch.equal(smaller[0], expected[0])


@pytest.mark.parametrize("constant", [2.0**-140, 2.0**-60, 2.0**90], ids=str)
def test_the_ridge_from_the_data_does_not_depend_on_the_scale(constant: float) -> None:
    weight, first = oracle.layer(20, 16, 40, seed=1, dtype=torch.float32)
    second = oracle.layer(20, 16, 40, seed=2, dtype=torch.float32)[1]
    ridge, ridges, losses, fallbacks = OPS.choose_ridge(weight, first.double(), second.double(), 80)
    scaled = OPS.choose_ridge(weight, first.double() * constant, second.double() * constant, 80)
    assert torch.equal(scaled[0], ridge)
    assert torch.equal(scaled[1], ridges)
    assert torch.equal(scaled[2], torch.where(losses == -1, -1, losses * constant))  # -1: not tried
    assert torch.equal(scaled[3], fallbacks)


# --- the scale of W ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@EVERY_SETTING
def test_a_power_of_two_times_a_row_changes_no_bit(setting: str, dtype: torch.dtype, symmetric: bool) -> None:
    weight, hessian = whole_numbers(7, 70, 4)
    weight, hessian = weight.to(dtype), hessian.float()
    options = {**options_of(setting, symmetric=symmetric), "bits": 3, "group_size": 32}
    expected = OPS.gptq(weight, hessian, **options)
    exponents = torch.tensor([0, -75, -110, 55, -31, 31, 3])
    factors = torch.exp2(exponents.double()).to(dtype)[:, None]
    result = OPS.gptq(weight * factors, hessian, **options)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1] * factors)
    assert torch.equal(result[2], expected[2])
    held = expected[3].double() * factors[:, 0].double() ** 2
    torch.testing.assert_close(result[3].double(), held.to(result[3].dtype).double(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_searches_help_weights_whose_squares_float32_cannot_hold(dtype: torch.dtype) -> None:
    weight, hessian = oracle.layer(16, 64, 200, seed=3)
    small = (weight * 1e-22 / weight.abs().mean()).to(dtype)
    assert bool((small.float().square() < 1e-42).all())
    losses = {}
    for method in ("absmax", "mse"):
        result = OPS.rtn(small, bits=3, scale_method=method)
        losses[method] = float(
            damped_loss(small.double() * 1e22, torch.eye(64).double(), _scaled(result, 1e22), 0.0).sum()
        )
    assert losses["mse"] < 0.95 * losses["absmax"]
    best = OPS.gptq(small, hessian * 1e6, bits=3, **options_of("best", symmetric=True))
    plain = OPS.gptq(small, hessian * 1e6, bits=3)
    assert float(best[3].double().sum()) < 0.9 * float(plain[3].double().sum())
    assert bool((best[3] > 0).all())
    measured = damped_loss(small.double() * 1e22, hessian * 1e6, _scaled(best, 1e22), 0.01)
    # The scales of the result are those of the stored dtype, and so is its loss.
    torch.testing.assert_close(best[3].double() * 1e44, measured, rtol=2e-3, atol=0)


def _scaled(result: Any, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    return result[0], result[1].double() * factor, result[2]


def test_given_scales_follow_the_weight() -> None:
    weight, hessian = whole_numbers(3, 20, 5)
    scales = torch.full((3, 1), 16.0)
    expected = OPS.gptq(weight.float(), hessian, scales=scales, refine=2)
    for exponent in (-100, 50):
        factor = 2.0**exponent
        result = OPS.gptq(weight.float() * factor, hessian, scales=scales * factor, refine=2)
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1] * factor)
    # A scale far above the weight rounds it to 0, one far below clips it.
    assert not OPS.gptq(weight.float() * 2.0**-100, hessian, scales=torch.full((3, 1), 2.0**100))[0].any()
    clipped = OPS.gptq(weight.float() * 2.0**30, hessian, scales=torch.full((3, 1), 2.0**-90))
    assert bool((clipped[0].abs() == 7).any())
    assert torch.equal(clipped[1], torch.full((3, 1), 2.0**-90))


@pytest.mark.parametrize("method", ["absmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_rtn_takes_any_scale(method: str, symmetric: bool) -> None:
    weight = whole_numbers(6, 50, 6)[0].float()
    expected = OPS.rtn(weight, symmetric=symmetric, scale_method=method)
    for exponent in (-115, -70, 64, 110):
        result = OPS.rtn(weight * 2.0**exponent, symmetric=symmetric, scale_method=method)
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1] * 2.0**exponent)


def test_quantization_loss_takes_any_scale() -> None:
    weight, hessian = whole_numbers(5, 30, 7)
    values = weight.add(3)
    expected = miniquant.quantization_loss(weight, values, hessian)
    for of_weight, of_hessian in ((-500, 900), (500, -990), (-300, 10)):
        result = miniquant.quantization_loss(
            weight * 2.0**of_weight, values * 2.0**of_weight, hessian * 2.0**of_hessian
        )
        assert torch.equal(result, expected * 2.0 ** (2 * of_weight + of_hessian))


# --- dead inputs ------------------------------------------------------------------------------------------------------


def layer_with_dead_inputs(seed: int, rows: int, columns: int, dead: list[int]) -> tuple[Tensor, Tensor]:
    weight, hessian = oracle.layer(rows, columns, 2 * columns + 3, seed=seed)
    hessian[dead] = 0
    hessian[:, dead] = 0
    weight[:, dead] *= 3
    return weight, hessian


def nearest(weight: Tensor, result: Any, group_size: int, bits: int, *, symmetric: bool, full_range: bool) -> Tensor:
    """The codes of `weight` rounded to nearest on the scales of a result."""
    of_column = torch.arange(weight.shape[1]) // group_size
    scale, zero_point = result[1][:, of_column], result[2][:, of_column].to(weight.dtype)
    low, high = oracle.code_range(bits, symmetric=symmetric)
    low -= 1 if full_range else 0
    codes: Tensor = ((weight / scale).round() + zero_point).clamp(low, high).to(torch.int8)
    return codes


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@EVERY_SETTING
@hypothesis.given(st.integers(0, 1000), st.integers(2, 50), st.data())
@hypothesis.settings(max_examples=15)
def test_dead_inputs_end_nearest_on_the_final_scales(
    setting: str, symmetric: bool, seed: int, columns: int, data: st.DataObject
) -> None:
    dead = data.draw(st.lists(st.integers(0, columns - 1), min_size=1, max_size=4, unique=True))
    ridge = data.draw(st.sampled_from([0.0, 0.01]))
    weight, hessian = layer_with_dead_inputs(seed, 5, columns, dead)
    options = options_of(setting, symmetric=symmetric)
    for dtype in (torch.float64, torch.float32):
        w, h = weight.to(dtype), hessian.to(dtype)
        result = OPS.gptq(w, h, bits=4, group_size=16, ridge=ridge, **options)
        expected = nearest(w, result, 16, 4, symmetric=symmetric, full_range=bool(options.get("full_range", False)))
        assert torch.equal(result[0][:, dead], expected[:, dead])
        assert bool((result[3] >= 0).all())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@EVERY_SETTING
@hypothesis.given(st.integers(0, 1000), st.integers(2, 50), st.data())
@hypothesis.settings(max_examples=10)
def test_no_search_clips_a_dead_input(
    setting: str, bits: int, symmetric: bool, seed: int, columns: int, data: st.DataObject
) -> None:
    dead = data.draw(st.lists(st.integers(0, columns - 1), min_size=1, max_size=4, unique=True))
    ridge = data.draw(st.sampled_from([0.0, 0.01]))
    weight, hessian = layer_with_dead_inputs(seed, 5, columns, dead)
    options = {"bits": bits, "group_size": 16, **options_of(setting, symmetric=symmetric)}
    of_grid = {name: options[name] for name in ("bits", "group_size", "symmetric", "full_range") if name in options}
    for dtype in (torch.float64, torch.float32):
        w, h = weight.to(dtype), hessian.to(dtype)
        result = OPS.gptq(w, h, ridge=ridge, **options)
        error = (w - OPS.dequantize(*result[:3], 16))[:, dead].abs()
        nearest_error = (w - OPS.dequantize(*OPS.rtn(w, **of_grid), 16))[:, dead].abs()
        half_a_step = result[1][:, torch.tensor(dead) // 16].abs() / 2
        assert bool((error <= torch.maximum(half_a_step, nearest_error) * (1 + 1e-5)).all())


def test_a_dead_input_that_outweighs_its_group() -> None:
    """Without a ridge no search sees the column: its scale is then that of rounding to nearest, or larger."""
    weight, hessian = layer_with_dead_inputs(seed=1, rows=40, columns=16, dead=[3])
    weight[:, 3] *= 20
    for setting in ({"scale_method": "hessian"}, {"scale_method": "mse", "full_range": True}, miniquant.preset("best")):
        result = OPS.gptq(weight, hessian, group_size=-1, ridge=0.0, **setting)
        error = (weight - OPS.dequantize(*result[:3], -1))[:, 3].square().sum()
        assert error < 1e-2 * weight[:, 3].square().sum()


def test_a_dead_input_after_its_scale_was_refined() -> None:
    weight = torch.tensor([[0.4, 0.4, -1.9]])
    hessian = torch.tensor([[1.588, -0.225, 0.0], [-0.225, 1.81, 0.0], [0.0, 0.0, 0.0]])
    for dtype in (torch.float32, torch.float64):
        result = OPS.gptq(weight.to(dtype), hessian.to(dtype), ridge=0.0, refine=2)
        assert result[0].tolist() == [[1, 1, -5]]


def test_the_hessian_importance_counts_the_ridge() -> None:
    """A column that calibration hardly saw keeps the weight of the ridge, so a large value is not clipped away."""
    weight, hessian = oracle.layer(20, 16, 50, seed=5)
    hessian[3] *= 1e-3
    hessian[:, 3] *= 1e-3
    weight[:, 3] = 8 * weight.abs().amax(1)
    errors = []
    for ridge in (0.0, 0.01, 0.1, 1.0):
        result = OPS.gptq(weight, hessian, scale_method="hessian", group_size=-1, ridge=ridge)
        values = OPS.dequantize(*result[:3], -1)
        errors.append(float((weight - values)[:, 3].square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.02 * errors[0]


# --- losses -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_cancels_is_not_negative() -> None:
    weight = torch.tensor([[1.8, -2.4]])
    hessian = torch.tensor([[1.447358250617981, 0.6098520159721375], [0.6098520159721375, 1.8585284948349]])
    for h in (hessian, hessian.double()):
        result = OPS.gptq(weight, h, symmetric=False, refine=2)
        measured = damped_loss(weight, h, result, 0.01)
        assert 0 <= result[3].item() == pytest.approx(measured.item(), rel=1e-6)


@hypothesis.given(
    st.integers(0, 1000),
    st.integers(1, 12),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(["plain", "dynamic", "fast", "hessian", "loss"]),
    st.sampled_from([0, 2]),
)
@hypothesis.settings(max_examples=80)
def test_refinement_never_raises_a_loss_and_none_is_negative(
    seed: int, columns: int, bits: int, symmetric: bool, setting: str, beam_scales: int
) -> None:
    weight, hessian = oracle.layer(12, columns, 2 * columns + 1, seed=seed)
    # Some rows are on a grid or close to it: refinement can reduce their loss to 0.
    weight[:4] = (weight[:4] * 4).round() / 4
    options = options_of(setting, symmetric=symmetric)
    if setting == "loss":
        options["beam_scales"] = beam_scales
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        before = OPS.gptq(weight.to(dtype), hessian, bits=bits, group_size=5, **options)[3]
        assert bool((before >= 0).all())
        for rounds in (1, 2, 4):
            loss = OPS.gptq(weight.to(dtype), hessian, bits=bits, group_size=5, refine=rounds, **options)[3]
            assert bool((loss >= 0).all())
            assert bool((loss <= before).all())


@EVERY_SETTING
def test_no_rows_one_column_and_groups_that_do_not_divide(setting: str) -> None:
    options = options_of(setting, symmetric=True)
    for rows, columns, group_size in ((0, 5, 2), (3, 1, 4), (0, 1, -1), (4, 7, 3), (2, 10, 16)):
        weight, hessian = oracle.layer(max(rows, 1), columns, 20, seed=8)
        codes, scales, _, row_loss = OPS.gptq(weight[:rows], hessian, group_size=group_size, **options)
        assert codes.shape == (rows, columns)
        assert scales.shape == (rows, 1 if group_size == -1 else math.ceil(columns / group_size))
        assert row_loss.shape == (rows,)
        assert bool((row_loss >= 0).all())


# --- scales that overflow ---------------------------------------------------------------------------------------------


def grid_extremes(result: Any, bits: int, *, symmetric: bool, full_range: bool) -> Tensor:
    """The dequantized values of the smallest and the largest code of each group."""
    low, high = oracle.code_range(bits, symmetric=symmetric)
    low -= 1 if full_range else 0
    groups = result[1].shape[1]
    codes = torch.tensor([[low, high]], dtype=torch.int8).repeat(result[1].shape[0], groups)
    return miniquant.dequantize(codes, result[1], result[2], 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("grid", ["symmetric", "full_range", "asymmetric"])
def test_every_code_of_the_largest_weights_is_finite(grid: str, bits: int, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    rows = [[most, 0.0], [-most, 0.0], [most, -most], [most, -most / 3], [most / 5, -most], [most * 0.99, most / 2]]
    weight = torch.tensor(rows, dtype=torch.float64).to(dtype)
    assert bool(weight.isfinite().all())
    symmetric, full_range = grid != "asymmetric", grid == "full_range"
    options = {"bits": bits, "group_size": 2, "symmetric": symmetric, "full_range": full_range}
    results = [OPS.rtn(weight, **options), OPS.rtn(weight, scale_method="mse", **options)]
    # Small enough for the loss of such weights to be in range.
    factor = 2.0**-1060 if dtype == torch.float64 else 2.0**-170
    hessian = torch.tensor([[1.0, 0.25], [0.25, 1.0]], dtype=torch.float64) * factor
    settings = ["plain", "refined", "loss", "best"]
    results += [
        OPS.gptq(weight, hessian, **{**options, **options_of(name, symmetric=symmetric), "full_range": full_range})
        for name in settings
    ]
    for result in results:
        assert bool(result[1].isfinite().all())
        assert bool(OPS.dequantize(*result[:3], 2).isfinite().all())
        assert bool(grid_extremes(result, bits, symmetric=symmetric, full_range=full_range).isfinite().all())
    # No scale is smaller than necessary: each weight is within one step of its value.
    rounded = OPS.dequantize(*results[0], 2).double()
    steps = results[0][1].double().abs()
    assert bool(((weight.double() - rounded).abs() <= 1.01 * steps).all())
    reference = OPS.gptq_reference(weight, torch.eye(2, dtype=torch.float64) * hessian[0, 0], **options)
    assert oracle.same_bits(reference[:3], results[0])


def test_the_scale_that_overflowed() -> None:
    result = OPS.rtn(torch.tensor([[65504.0]], dtype=torch.float16))
    assert result[1].item() == 9352
    assert OPS.dequantize(*result, 64).item() == 65472
