"""The options that lower the loss at the same bits: full range, scale and beam search, group order, refinement."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import miniquant
import oracle

Tensor = torch.Tensor

GROUP = 16
# (rows, columns): less than a tile and a panel; groups that are no multiple of a strip, with a shorter last one.
SHAPES = [(3, 40), (101, 131)]


def problem(rows: int, columns: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64).cumsum(1) / 4
    inputs += torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64)
    inputs *= torch.rand(columns, generator=generator, dtype=torch.float64) + 0.1
    hessian = inputs.T @ inputs / len(inputs)
    return weight.to(dtype), ((hessian + hessian.T) / 2).to(dtype)


def row_losses(weight: Tensor, hessian: Tensor, result: Any, group_size: int, ridge: float = 0.01) -> Tensor:
    """e H e^T with the ridge in H, float64."""
    values = torch.from_numpy(oracle.dequantize(result.codes, result.scales, result.zero_points, group_size))
    error = (weight.double() - values).numpy()
    return torch.from_numpy(oracle.quadratic_form(error, oracle.damp(hessian, ridge).numpy()))


def groups_of(values: Tensor, group_size: int) -> list[Tensor]:
    return list(values.split(group_size, dim=1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_full_range_gives_the_largest_weight_the_lowest_code(rows: int, columns: int, bits: int) -> None:
    weight, _ = problem(rows, columns)
    result = miniquant.rtn(weight, bits=bits, group_size=GROUP, full_range=True)
    half = 2 ** (bits - 1)
    assert int(result.codes.min()) == -half
    assert int(result.codes.max()) <= half - 1
    assert torch.equal(result.zero_points, torch.zeros_like(result.zero_points))
    for group, (values, codes) in enumerate(zip(groups_of(weight, GROUP), groups_of(result.codes, GROUP), strict=True)):
        largest = values.abs().argmax(1, keepdim=True)
        extreme = values.gather(1, largest)[:, 0]
        torch.testing.assert_close(result.scales[:, group], -extreme / half)
        assert (codes.gather(1, largest) == -half).all()


def test_codes_of_the_full_range_pack_and_dequantize() -> None:
    weight, hessian = problem(9, 50, torch.float32)
    result = miniquant.gptq(weight, hessian, group_size=GROUP, full_range=True, scale_method="mse")
    assert bool((result.scales < 0).any())
    assert bool((result.scales > 0).any())
    packed = miniquant.pack_int4(result.codes)
    assert torch.equal(miniquant.unpack_int4(packed, 50), result.codes)
    values = miniquant.dequantize(result.codes, result.scales, result.zero_points, GROUP)
    loss = miniquant.quantization_loss(weight, values, torch.from_numpy(oracle.damp(hessian, 0.01).numpy()).double())
    torch.testing.assert_close(result.row_loss, loss, rtol=1e-4, atol=0.0)


GRIDS: list[dict[str, Any]] = [{}, {"full_range": True}, {"symmetric": False}]


def weighted_errors(weight: Tensor, result: Any, importance: Tensor) -> Tensor:
    """[N, G]: sum_j importance_j (w_j - q_j)^2 of each group."""
    values = torch.from_numpy(oracle.dequantize(result.codes, result.scales, result.zero_points, GROUP))
    errors = (weight.double() - values).square() * importance
    return torch.stack([group.sum(1) for group in groups_of(errors, GROUP)], dim=1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_searched_scale_is_never_worse_and_mostly_better(dtype: torch.dtype, grid: dict[str, Any]) -> None:
    weight, _ = problem(33, 131, dtype)
    ones = torch.ones(131, dtype=torch.float64)
    plain = weighted_errors(weight, miniquant.rtn(weight, bits=3, group_size=GROUP, **grid), ones)
    result = miniquant.rtn(weight, bits=3, group_size=GROUP, scale_method="mse", **grid)
    searched = weighted_errors(weight, result, ones)
    assert result.scales.dtype == dtype
    assert bool((searched <= plain * (1 + 1e-5)).all())
    assert float((searched < plain).double().mean()) > 0.5


@pytest.mark.parametrize("method", ["mse", "hessian"])
def test_the_searched_scale_is_the_best_of_its_candidates(method: Any) -> None:
    """By brute force: scales for 0.5 to 1.1 times the group's range in steps of 1/40, of either sign."""
    weight, hessian = problem(17, 64)
    importance = oracle.damp(hessian, 0.01).diagonal() if method == "hessian" else torch.ones(64, dtype=torch.float64)
    result = miniquant.gptq(weight, hessian, group_size=GROUP, full_range=True, scale_method=method)
    for group, values in enumerate(groups_of(weight, GROUP)):
        weights = importance[group * GROUP : (group + 1) * GROUP]
        base = values.abs().amax(1, keepdim=True) / 8

        def error(scale: Tensor, values: Tensor = values, weights: Tensor = weights) -> Tensor:
            levels = torch.clamp(torch.round(values / scale), -8, 7)
            return ((values - levels * scale).square() * weights).sum(1)

        candidates = [error(base * sign * (1 + step / 40)) for step in range(-20, 5) for sign in (1, -1)]
        least = torch.stack(candidates).amin(0)
        torch.testing.assert_close(error(result.scales[:, group : group + 1]), least, rtol=1e-12, atol=0.0)


def order_within(hessian: Tensor) -> list[int]:
    """From the last position to the first, each takes the column of least variance given those already placed."""
    remaining, behind = list(range(len(hessian))), list[int]()
    while remaining:
        known = hessian[behind][:, behind]
        given = [
            float(hessian[j, j] - hessian[j, behind] @ torch.linalg.solve(known, hessian[behind, j])) for j in remaining
        ]
        behind.insert(0, remaining.pop(given.index(min(given))))
    return behind


@pytest.mark.parametrize("group_size", [1, 16, 64, -1])
def test_group_order_is_the_natural_order_of_permuted_columns(group_size: int) -> None:
    weight, hessian = problem(20, 128)
    size = 128 if group_size == -1 else group_size
    means = hessian.diagonal().reshape(-1, size).mean(1)
    order = torch.cat(
        [
            group * size + torch.tensor(order_within(hessian[group * size :, group * size :][:size, :size]))
            for group in means.argsort(descending=True, stable=True).tolist()
        ]
    )
    permuted = miniquant.gptq(weight[:, order], hessian[order][:, order], group_size=group_size)
    result = miniquant.gptq(weight, hessian, group_size=group_size, column_order="group")
    assert torch.equal(result.codes[:, order], permuted.codes)
    torch.testing.assert_close(result.row_loss, permuted.row_loss)


def test_columns_of_a_long_group_are_in_the_order_of_their_diagonal() -> None:
    weight, hessian = problem(3, 513)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    permuted = miniquant.gptq(weight[:, order], hessian[order][:, order], group_size=-1)
    result = miniquant.gptq(weight, hessian, group_size=-1, column_order="group")
    assert torch.equal(result.codes[:, order], permuted.codes)


@pytest.mark.parametrize("group_scales", ["static", "dynamic"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_reference_agrees(grid: dict[str, Any], group_scales: Any) -> None:
    """131 columns in groups of 16: the last, shorter group comes last in group order."""
    weight, hessian = problem(21, 131)
    options: dict[str, Any] = {"group_size": GROUP, "column_order": "group", "group_scales": group_scales, **grid}
    result = miniquant.gptq(weight, hessian, **options)
    reference = miniquant.gptq_reference(weight, hessian, **options)
    assert torch.equal(result.codes, reference.codes)
    torch.testing.assert_close(result.scales, reference.scales)
    torch.testing.assert_close(result.row_loss, reference.row_loss)


BEST: list[dict[str, Any]] = [
    {"group_scales": "dynamic", "scale_method": "loss", "column_order": order, **grid}
    for grid in GRIDS
    for order in ("natural", "group")
]


@pytest.mark.parametrize("options", BEST, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scales_chosen_by_the_loss(dtype: torch.dtype, options: dict[str, Any]) -> None:
    weight, hessian = problem(60, 131, dtype)
    hessian = hessian.float() if dtype == torch.bfloat16 else hessian
    plain = miniquant.gptq(weight, hessian, group_size=GROUP, **{**options, "scale_method": "absmax"}).row_loss.double()
    result = miniquant.gptq(weight, hessian, group_size=GROUP, **options)
    losses = row_losses(weight, hessian, result, GROUP)
    torch.testing.assert_close(result.row_loss.double(), losses, rtol=1e-3 if dtype != torch.float64 else 1e-9, atol=0)
    assert float(losses.sum()) < 0.9 * float(plain.sum())


def trial_scales(updated: Tensor, grid: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """The 25 scales and zero points, [N] each, in the order in which they are tried; 4 bits."""
    factors = [1.0] + [1 - step / 40 for step in range(1, 21)] + [1 + step / 40 for step in range(1, 5)]
    low, high = updated.amin(1), updated.amax(1)
    scales: list[tuple[Tensor, Tensor]] = []
    for factor in factors:
        if grid.get("symmetric", True):
            largest = torch.maximum(high * factor, -low * factor)
            scale = largest / (8 if grid.get("full_range") else 7)
            scale = torch.where(high > -low, -scale, scale) if grid.get("full_range") else scale
            scales.append((scale, torch.zeros_like(scale)))
        else:
            bottom, top = (low * factor).clamp(max=0), (high * factor).clamp(min=0)
            scale = (top - bottom) / 15
            scales.append((scale, -8 + torch.round(-bottom / scale).clamp(0, 15)))
    return scales


def beam(
    weight: Tensor, sums: Tensor, factor: Tensor, scale: Tensor, levels: tuple[Tensor, Tensor], width: int
) -> tuple[Tensor, Tensor]:
    """The group's loss and levels, [N] and [N, G]: the best of `width` partial choices kept; 1 is the nearest plane."""
    rows, columns = weight.shape
    low, high = levels[0][:, None], levels[1][:, None]
    loss = torch.zeros(rows, 1, dtype=weight.dtype)
    error = torch.zeros(rows, 1, columns, dtype=weight.dtype)
    level = torch.zeros_like(error)
    for j in range(columns):
        pivot = factor[j, j]
        target = weight[:, j : j + 1] + (sums[:, j : j + 1] + error[:, :, :j] @ factor[:j, j]) / pivot
        nearest = torch.clamp(torch.round(target / scale[:, None]), low, high)
        other = nearest + torch.where(target / scale[:, None] > nearest, 1.0, -1.0)
        choices = torch.stack([nearest, other], 2) if width > 1 else nearest[:, :, None]
        added = (pivot * (target[:, :, None] - choices * scale[:, None, None])).square()
        impossible = (choices < low[:, :, None]) | (choices > high[:, :, None])
        total = (loss[:, :, None] + added.masked_fill(impossible, torch.inf)).flatten(1)
        loss, at = total.topk(min(width, total.shape[1]), dim=1, largest=False)
        parent = (at // choices.shape[2])[:, :, None].expand(-1, -1, columns)
        chosen = choices.flatten(1).gather(1, at)
        error, level = error.gather(1, parent).clone(), level.gather(1, parent).clone()
        level[:, :, j] = chosen
        error[:, :, j] = weight[:, j : j + 1] - chosen * scale[:, None]
    best = loss.argmin(1)
    every = torch.arange(rows)
    return loss[every, best], level[every, best]


@pytest.mark.parametrize(("group_size", "beam_scales"), [(5, 2), (13, 3), (64, 0), (64, 1), (64, 8), (-1, 25)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_best_scales_and_codes_are_those_of_a_plain_search(
    grid: dict[str, Any], group_size: int, beam_scales: int
) -> None:
    """131 columns, float64: the trials and the beam search written out plainly give the same codes."""
    weight, hessian = problem(20, 131, seed=3)
    result = miniquant.gptq(
        weight,
        hessian,
        group_size=group_size,
        group_scales="dynamic",
        scale_method="loss",
        beam_scales=beam_scales,
        **grid,
    )
    damped = torch.from_numpy(oracle.damp(hessian, 0.01).numpy())
    factor = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    lowest, highest = (-8.0 if grid.get("full_range") or not grid.get("symmetric", True) else -7.0), 7.0
    error = torch.zeros_like(weight)
    total = torch.zeros(len(weight), dtype=torch.float64)
    for group, begin in enumerate(range(0, 131, 131 if group_size == -1 else group_size)):
        columns = slice(begin, min(131, begin + (131 if group_size == -1 else group_size)))
        own, block = weight[:, columns], factor[columns, columns]
        sums = error[:, :begin] @ factor[:begin, columns]
        updated = own + torch.linalg.solve_triangular(block, sums, upper=True, left=False)
        trials = trial_scales(updated, grid)
        losses = torch.stack(
            [beam(own, sums, block, scale, (lowest - zero, highest - zero), 1)[0] for scale, zero in trials]
        )
        order = losses.argsort(dim=0, stable=True)
        least = losses.gather(0, order[:1])[0]
        every = torch.arange(len(weight))
        scales, zeros = (torch.stack(parts) for parts in zip(*trials, strict=True))
        scale, zero = scales[order[0], every], zeros[order[0], every]
        level = beam(own, sums, block, scale, (lowest - zero, highest - zero), 1)[1]
        for best in order[:beam_scales]:
            tried, offset = scales[best, every], zeros[best, every]
            loss, found = beam(own, sums, block, tried, (lowest - offset, highest - offset), 4)
            nearest = losses[best, every]
            better = (loss < least * (1 - 1e-12)) & (nearest <= 1.1 * losses.amin(0))
            least = torch.where(better, loss, least)
            scale, zero = torch.where(better, tried, scale), torch.where(better, offset, zero)
            level = torch.where(better[:, None], found, level)
        assert torch.equal(result.codes[:, columns].double(), level + zero[:, None])
        torch.testing.assert_close(result.scales[:, group], scale, rtol=1e-9, atol=0.0)
        assert torch.equal(result.zero_points[:, group].double(), zero)
        error[:, columns] = own - level * scale[:, None]
        total += least
    torch.testing.assert_close(result.row_loss, total, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("options", BEST, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_beam_search_lowers_the_loss(dtype: torch.dtype, options: dict[str, Any]) -> None:
    weight, hessian = problem(150, 200, dtype)
    hessian = hessian.float() if dtype == torch.bfloat16 else hessian
    before = float(miniquant.gptq(weight, hessian, group_size=64, **options).row_loss.double().sum())
    result = miniquant.gptq(weight, hessian, group_size=64, beam_scales=4, **options)
    losses = row_losses(weight, hessian, result, 64)
    torch.testing.assert_close(result.row_loss.double(), losses, rtol=1e-3 if dtype != torch.float64 else 1e-9, atol=0)
    assert float(losses.sum()) < 0.98 * before


BEAMS: list[dict[str, Any]] = [{**options, "beam_scales": 3} for options in BEST[1::2]]

REFINED: list[dict[str, Any]] = [{}, {"full_range": True}, {"symmetric": False}, *BEST[1::2], *BEAMS]


@pytest.mark.parametrize("options", REFINED, ids=str)
@pytest.mark.parametrize("group_size", [7, 16, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_no_round_of_refinement_raises_any_rows_loss(
    dtype: torch.dtype, group_size: int, options: dict[str, Any]
) -> None:
    weight, hessian = problem(60, 131, dtype)
    hessian = hessian.float() if dtype == torch.float16 else hessian
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    before = row_losses(weight, hessian, miniquant.gptq(weight, hessian, group_size=group_size, **options), group_size)
    first = before
    for rounds in (1, 2, 3, 30):
        result = miniquant.gptq(weight, hessian, group_size=group_size, refine=rounds, **options)
        losses = row_losses(weight, hessian, result, group_size)
        assert bool((losses <= before * (1 + tolerance)).all()), rounds
        # The reported loss is that of the codes with the stored scales.
        torch.testing.assert_close(
            result.row_loss.double(), losses, rtol=1e-3 if dtype != torch.float64 else 1e-9, atol=0.0
        )
        before = losses
    # One group to a row leaves a single scale to fit.
    assert float(before.sum()) < (0.97 if group_size < 131 else 0.999) * float(first.sum())
    again = miniquant.gptq(weight, hessian, group_size=group_size, refine=1000, **options)
    more = miniquant.gptq(weight, hessian, group_size=group_size, refine=1001, **options)
    assert torch.equal(again.codes, more.codes), "it stops when nothing changes"


def test_refined_codes_are_where_no_single_move_lowers_the_loss() -> None:
    weight, hessian = problem(30, 131)
    result = miniquant.gptq(weight, hessian, group_size=GROUP, refine=1000)
    damped = torch.from_numpy(oracle.damp(hessian, 0.01).numpy())
    values = torch.from_numpy(oracle.dequantize(result.codes, result.scales, result.zero_points, GROUP))
    gradient = (weight - values) @ damped
    scale = result.scales.repeat_interleave(GROUP, 1)[:, :131]
    for step in (1, -1):
        move = step * scale
        change = move.square() * damped.diagonal() - 2 * move * gradient
        allowed = (result.codes + step).abs() <= 7
        assert bool((change[allowed] >= -1e-10).all())


@pytest.mark.parametrize(
    "options", [{"refine": 3}, {**BEST[-1], "refine": 3}, BEAMS[-1], {"scale_method": "mse"}], ids=str
)
def test_neither_threads_nor_rows_change_a_bit(options: dict[str, Any]) -> None:
    weight, hessian = problem(200, 131, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(miniquant.gptq(weight, hessian, group_size=GROUP, **options))
    finally:
        torch.set_num_threads(threads)
    alone = miniquant.gptq(weight[77:78], hessian, group_size=GROUP, **options)
    for name in ("codes", "scales", "zero_points", "row_loss"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name))
        assert torch.equal(getattr(results[0], name), getattr(results[2], name))
        assert torch.equal(getattr(results[0], name)[77:78], getattr(alone, name))


@pytest.mark.parametrize("options", [{}, {"full_range": True}, BEST[-1], *BEAMS], ids=str)
@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_dead_inputs_and_zero_weights(ridge: float, options: dict[str, Any]) -> None:
    weight, hessian = problem(10, 64)
    hessian[5] = 0
    hessian[:, 5] = 0
    weight[:, 16:32] = 0
    weight[3] = 0
    result = miniquant.gptq(weight, hessian, group_size=GROUP, ridge=ridge, refine=5, **options)
    assert bool(torch.isfinite(result.row_loss).all())
    assert bool(torch.isfinite(result.scales).all())
    assert float(result.row_loss[3]) == 0.0
    torch.testing.assert_close(
        result.row_loss, row_losses(weight, hessian, result, GROUP, ridge), rtol=1e-8, atol=1e-14
    )


def test_the_lab_gains() -> None:
    lab = oracle.lab("normal")
    plain = float(miniquant.gptq(lab.weight, lab.hessian).row_loss.double().sum())
    best = float(miniquant.gptq(lab.weight, lab.hessian, **{**BEST[3], "refine": 10}).row_loss.double().sum())
    assert best < 0.5 * plain
