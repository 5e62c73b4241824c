"""A ridge from the data, the accumulator's halves, and GPTQ with both."""

from __future__ import annotations

import math

import pytest
import torch

import miniquant
from miniquant import HessianAccumulator
from miniquant.ridge import POWER_OF_TOKENS, ridge_by_halves

Tensor = torch.Tensor
COLUMNS = 96


def correlated(tokens: int, seed: int, columns: int = COLUMNS) -> Tensor:
    """Tokens in a few directions with some noise, like a layer's inputs."""
    basis = torch.randn(8, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    strength = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
    return strength @ basis + 0.3 * torch.randn(tokens, columns, generator=generator, dtype=torch.float64)


def white(tokens: int, seed: int, columns: int = COLUMNS) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_of(rows: int = 40, columns: int = COLUMNS) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def accumulate(inputs: Tensor) -> HessianAccumulator:
    accumulator = HessianAccumulator(inputs.shape[1], dtype=torch.float64, halves=True)
    accumulator.update(inputs)
    return accumulator


def hessian_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def held_out_ratio(weight: Tensor, result: miniquant.GptqResult, fresh: Tensor) -> float:
    """The loss on fresh tokens, relative to that of rounding to nearest."""

    def loss(quantized: miniquant.QuantizedWeight | miniquant.GptqResult) -> float:
        values = miniquant.dequantize(quantized.codes, quantized.scales, quantized.zero_points, 64)
        return float(miniquant.quantization_loss(weight, values, hessian_of(fresh)).sum())

    return loss(result) / loss(miniquant.rtn(weight))


def test_halves_are_sums_of_their_own() -> None:
    inputs = white(11, 1)
    accumulator = accumulate(inputs)
    torch.testing.assert_close(accumulator.half(0), hessian_of(inputs[:6]))
    torch.testing.assert_close(accumulator.half(1), hessian_of(inputs[6:]))
    torch.testing.assert_close(accumulator.hessian(), hessian_of(inputs))
    assert accumulator.tokens == 11
    assert [accumulator.half_tokens(0), accumulator.half_tokens(1)] == [6, 5]


def test_later_batches_stay_whole_and_go_where_fewer_tokens_are() -> None:
    inputs = white(100, 1)
    accumulator = HessianAccumulator(COLUMNS, dtype=torch.float64, halves=True)
    # 10 are cut 5 + 5; 4 go to the first half; 6 to the second; then 40, more than all before, cut so that 30 + 30.
    for batch in inputs[:60].split([10, 4, 6, 40]):
        accumulator.update(batch[:, None])
    first = torch.cat([inputs[0:5], inputs[10:14], inputs[20:41]])
    second = torch.cat([inputs[5:10], inputs[14:20], inputs[41:60]])
    torch.testing.assert_close(accumulator.half(0), hessian_of(first))
    torch.testing.assert_close(accumulator.half(1), hessian_of(second))
    accumulator.update(inputs[60])
    torch.testing.assert_close(accumulator.half(0), hessian_of(torch.cat([first, inputs[60:61]])))


def test_the_halves_name_what_they_want() -> None:
    accumulator = HessianAccumulator(4, halves=True)
    with pytest.raises(ValueError, match="expected at least one token in each half, but got 0 in total"):
        accumulator.half(0)
    accumulator.update(torch.ones(4))
    with pytest.raises(ValueError, match="expected at least one token in each half, but got 1 in total"):
        accumulator.half(1)
    with pytest.raises(ValueError, match="expected half to be 0 or 1, but got 2"):
        accumulator.half(2)
    assert accumulator.half_tokens(1) == 0
    with pytest.raises(ValueError, match="expected half to be 0 or 1, but got -1"):
        accumulator.half_tokens(-1)
    with pytest.raises(ValueError, match="expected halves that are kept apart"):
        HessianAccumulator(4).half(0)
    with pytest.raises(ValueError, match=r"expected inputs to have shape \[\.\.\., K\] = \[\.\.\., 4\]"):
        accumulator.update(torch.ones(3, 5))


def test_white_inputs_are_rounded_to_nearest() -> None:
    """The lab's case: fewer tokens than inputs, which say nothing about other tokens."""
    weight, inputs = weight_of(), white(32, 1)
    automatic = miniquant.gptq_auto(weight, accumulate(inputs))
    fixed = miniquant.gptq(weight, hessian_of(inputs))
    fresh = white(4000, 2)
    assert held_out_ratio(weight, automatic, fresh) < 1.01
    assert held_out_ratio(weight, fixed, fresh) > 1.3


@pytest.mark.parametrize("tokens", [64, 256, 2048])
def test_correlated_inputs_get_nearly_the_best_ridge(tokens: int) -> None:
    weight, fresh = weight_of(), correlated(8000, 2)
    inputs = correlated(tokens, 1)
    automatic = miniquant.gptq_auto(weight, accumulate(inputs))
    ratio = held_out_ratio(weight, automatic, fresh)
    ridges = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    best = min(held_out_ratio(weight, miniquant.gptq(weight, hessian_of(inputs), ridge=r), fresh) for r in ridges)
    assert ratio < 1.06 * best or tokens < 2 * COLUMNS, "few tokens are not trusted"
    assert ratio < 0.3


def test_the_choice_is_what_was_judged_best() -> None:
    weight, accumulator = weight_of(), accumulate(correlated(300, 1))
    choice = miniquant.choose_ridge(weight, accumulator)
    assert choice.ridges == tuple(sorted(choice.ridges))
    assert pytest.approx((128 / 300) ** 0.7) in choice.ridges
    assert len(choice.held_out) == len(choice.ridges)
    assert choice.held_out[-1] == 1.0
    assert choice.ridge == choice.ridges[choice.held_out.index(min(choice.held_out))]
    # The chosen ridge's loss by hand: quantize with one half, measure with the other. All 40 rows are used.
    halves = [accumulator.half(0), accumulator.half(1)]

    def judged(ridge: float) -> float:
        total = 0.0
        for calibration, other in (halves, halves[::-1]):
            result = miniquant.gptq(weight, calibration, ridge=ridge)
            values = miniquant.dequantize(result.codes, result.scales, result.zero_points, 64)
            total += float(miniquant.quantization_loss(weight, values, other).sum())
        return total

    expected = judged(choice.ridge * 2**0.7) / judged(choice.ridges[-1])
    assert min(choice.held_out) == pytest.approx(expected, rel=1e-12)


def test_the_result_is_that_of_the_ridge_that_is_reported() -> None:
    weight, accumulator = weight_of(), accumulate(correlated(300, 1))
    options = {"bits": 3, **miniquant.preset("best")}
    automatic = miniquant.gptq_auto(weight, accumulator, **options)
    assert automatic.ridge == automatic.choice.ridge
    assert automatic.failed == ()
    assert automatic.choice == miniquant.choose_ridge(weight, accumulator, bits=3)
    expected = miniquant.gptq(weight, accumulator.hessian(), ridge=automatic.ridge, **options)
    assert torch.equal(automatic.codes, expected.codes)


def indefinite(smallest: float) -> HessianAccumulator:
    """A wrong sum: symmetric, mean diagonal 1, with a negative eigenvalue."""
    wrong = torch.tensor([[1.0, 1.0 - smallest], [1.0 - smallest, 1.0]], dtype=torch.float64)
    return HessianAccumulator.from_sums(torch.stack([wrong, wrong]) * 200_000, [200_000, 200_000])


def test_a_larger_ridge_is_tried_and_reported() -> None:
    # Off-diagonal 1.2: positive definite from a ridge of 0.2 on, and the usual one for 400,000 tokens is 0.0036.
    accumulator = indefinite(-0.2)
    weight = weight_of(3, 2)
    choice = miniquant.choose_ridge(weight, accumulator)
    assert math.isinf(choice.held_out[0]), "with the usual ridge there is no factor"
    assert choice.ridges[0] == pytest.approx((128 / 400_000) ** 0.7)
    automatic = miniquant.gptq_auto(weight, accumulator)
    assert automatic.ridge > 0.2
    assert automatic.row_loss.isfinite().all()


def test_retries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, accumulator = weight_of(3, 2), indefinite(-0.2)
    ridge = 1e-2
    choice = miniquant.RidgeChoice(ridge, (ridge,), (1.0,), (10 * ridge, 100 * ridge, 1000 * ridge))
    monkeypatch.setattr("miniquant.ridge.choose_ridge", lambda *_arguments, **_options: choice)
    automatic = miniquant.gptq_auto(weight, accumulator)
    assert list(automatic.failed) == pytest.approx([ridge, 10 * ridge])
    assert automatic.ridge == pytest.approx(100 * ridge)
    choice = miniquant.RidgeChoice(1e-5, (1e-5,), (1.0,), (1e-4, 1e-3, 1e-2))
    with pytest.raises(torch.linalg.LinAlgError, match=r"ridge=0\.01 "):  # type: ignore[attr-defined]
        miniquant.gptq_auto(weight, accumulator)


@pytest.mark.parametrize("heavier", [1.0, 7.0])
def test_halves_times_a_number_give_the_same_ridge(heavier: float) -> None:
    """Whatever the tokens of a half weigh, both halves count alike."""
    weight, inputs = weight_of(), correlated(300, 1)
    accumulator = HessianAccumulator(COLUMNS, dtype=torch.float64, halves=True)
    for half, tokens in zip((1.0, heavier), inputs.split(150), strict=True):
        accumulator.update(tokens, token_weights=torch.full((150,), half))
    usual = miniquant.choose_ridge(weight, accumulator)
    halves = accumulator.proportional_halves()
    other = ridge_by_halves(weight, halves, accumulator.effective_tokens, bits=4, group_size=64, symmetric=True)
    assert (other.ridge, other.ridges) == (usual.ridge, usual.ridges)
    assert other.held_out == pytest.approx(usual.held_out, rel=1e-9)


def test_few_tokens_are_not_trusted_below_the_usual_ridge() -> None:
    weight = weight_of()
    few, enough = (miniquant.choose_ridge(weight, accumulate(correlated(n, 1))) for n in (2 * COLUMNS - 1, 2 * COLUMNS))
    assert few.ridges[0] == pytest.approx((128 / (2 * COLUMNS - 1)) ** 0.7)
    assert enough.ridges[0] < 0.5 * (128 / (2 * COLUMNS)) ** 0.7


def test_opcheck() -> None:
    hessian = hessian_of(white(50, 1))
    arguments = (weight_of(3), hessian, hessian + torch.eye(COLUMNS, dtype=torch.float64), 50)
    torch.library.opcheck(torch.ops.miniquant.choose_ridge.default, arguments, {"group_size": 32})


def test_usual_ridges_fall_with_the_power_of_the_tokens() -> None:
    halves = (hessian_of(white(200, 1)), hessian_of(white(200, 2)))
    usual = [
        ridge_by_halves(weight_of(), halves, tokens, bits=4, group_size=64, symmetric=True).ridges[0]
        for tokens in (50, 150)  # fewer than columns in a half: the usual ridge comes first
    ]
    assert usual[0] / usual[1] == pytest.approx(3**POWER_OF_TOKENS)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 1), (130, 3)])
def test_small_layers(rows: int, columns: int) -> None:
    accumulator = accumulate(white(6, 1, columns=columns))
    automatic = miniquant.gptq_auto(weight_of(rows, columns), accumulator)
    assert automatic.codes.shape == (rows, columns)
    assert automatic.ridge in automatic.choice.ridges


def test_what_is_no_accumulator_is_named() -> None:
    weight, inputs = weight_of(3), white(50, 1)
    with pytest.raises(
        TypeError, match=r"gptq_auto: expected accumulator to be a HessianAccumulator .* but got Tensor"
    ):
        miniquant.gptq_auto(weight, hessian_of(inputs))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"choose_ridge: expected accumulator to be a Hessian.* but got NoneType"):
        miniquant.choose_ridge(weight, None)  # type: ignore[arg-type]
    for call in (miniquant.gptq_auto, miniquant.choose_ridge):
        with pytest.raises(ValueError, match=r"expected halves that are kept apart \(halves=True"):
            call(weight, HessianAccumulator(COLUMNS))


def test_options_are_looked_at_before_any_work() -> None:
    accumulator = HessianAccumulator(COLUMNS, halves=True)  # has no token, so any work would raise an error
    with pytest.raises(TypeError, match=r"gptq_auto: expected no ridge .* but got 0\.1"):
        miniquant.gptq_auto(weight_of(3), accumulator, ridge=0.1)
    with pytest.raises(TypeError, match=r"gptq_auto: expected an option of gptq \(bits, .*\), but got 'bit'"):
        miniquant.gptq_auto(weight_of(3), accumulator, bit=3)


def test_the_result_is_one_of_gptq() -> None:
    weight = weight_of(6)
    automatic = miniquant.gptq_auto(weight, accumulate(correlated(300, 1)), bits=3, group_size=32)
    assert isinstance(automatic, miniquant.GptqResult)
    assert (automatic.bits, automatic.group_size) == (3, 32)
    assert miniquant.dequantize(automatic).shape == weight.shape


def test_weights_of_tokens_reach_the_choice() -> None:
    """Tokens of very small weight do not count: the ridges tried are those for the other tokens alone."""
    inputs = correlated(300, 1)
    accumulator = HessianAccumulator(COLUMNS, dtype=torch.float64, halves=True)
    accumulator.update(inputs, token_weights=torch.cat([torch.ones(250), torch.full((50,), 1e-6)]))
    assert pytest.approx((128 / 250) ** 0.7) in miniquant.choose_ridge(weight_of(4), accumulator).ridges
