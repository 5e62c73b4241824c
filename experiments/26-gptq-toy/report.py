"""Writes the README.md of the lab's folder from README.template.md: every figure is taken or computed here.

    python -m experiments.26-gptq-toy.report [FOLDER]

The two runs come from results.json, the time from manifest.json. The other figures (for other ridges, numbers of
tokens, seeds and the column order) are computed with the library by the functions of gptq_toy.py. Every claim of the
text is checked with `holds`: if the figures no longer support a claim, no README is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from benchmarks.common import tables

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import ModuleType

LAB = Path(__file__).resolve().parent
TEMPLATE = LAB / "README.template.md"

SCHEMES = ("rtn", "gptq", "best")
LAB_RATIO = (0.3, 0.7)  # what the lab expects of loss_gptq / loss_rtn; the upper end is its stop condition
LAB_SHARE = 0.1  # "usually a single-digit percentage" of codes changes
LAB_SECONDS = 30  # per layer
RIDGES = (0.01, 0.1, 1.0, 3.0, 10.0)
TOKENS = (128, 768, 2048, 8192)
OTHER_SEEDS = tuple(range(10))
TOP = 10  # rows that are listed
SHOWN_SEEDS = (0, 1)
PEAK = 0.99  # share of an outlier channel's energy that comes from one value
TIME_STEPS = (1, LAB_SECONDS)  # coarse steps: the page must not change with the load of the machine


class UnsupportedError(Exception):
    """The figures do not support a sentence of the README."""


def holds(claim: str, condition: bool) -> None:
    """Raises an error if a claim of the README does not hold for these figures."""
    if not condition:
        raise UnsupportedError(f"the figures do not support that {claim}: revise {TEMPLATE.name}")


def number(value: float) -> str:
    """A number with four significant digits and separated thousands; from 1e6 on with an exponent."""
    if abs(value) >= 1e6:
        return f"{value:.3e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def fixed(value: float) -> str:
    """A ratio: three digits after the point, fewer for a large one."""
    return f"{value:.3f}" if value < 10 else f"{value:.4g}"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{share * 100:.{digits}f}%"


def reflow(text: str, width: int = 120) -> str:
    """Fills paragraphs and list items; headings, tables, images and comments stay as they are."""
    blocks = []
    for block in text.split("\n\n"):
        items = re.split(r"\n(?=- )", block) if block.startswith("- ") else [block]
        if not block.startswith(("#", "|", "!", "<")):
            items = [
                textwrap.fill(
                    " ".join(item.split()),
                    width,
                    subsequent_indent="  " if item.startswith("- ") else "",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                for item in items
            ]
        blocks.append("\n".join(items))
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def rank_correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    """Spearman's rank correlation; in practice no two rows have equal losses, so ties are not handled."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (left, right)])
    return float(torch.corrcoef(ranks)[0, 1])


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Figures of further runs, which the answers need and results.json does not have."""

    ridges: dict[float, dict[str, Any]]  # normal inputs; "common_ratio" measures with the lab's ridge
    tokens: dict[int, dict[str, Any]]  # normal inputs
    cauchy_seeds: dict[int, dict[str, Any]]
    cauchy_activation: dict[str, Any]
    reference_changes: int  # codes in which the textbook form differs from GPTQ, both in float64, normal inputs
    error_growth: float  # ||E||^2 of GPTQ over that of RTN, normal inputs
    scale_correlation: float  # rank correlation of a row's RTN loss and the sum of its squared scales, normal inputs
    coupling: dict[str, float]  # mean |H_ij| / sqrt(H_ii H_jj) off the diagonal, H with its ridge
    top_token_share: float  # of tr(X X^T), Cauchy inputs
    top_channels_share: float  # of tr(H): its ten largest channels, Cauchy inputs
    top_channels_loss: float  # of RTN's loss: e_j^2 H_jj of those channels, Cauchy inputs
    top_channels_peak: float  # the least share that a single value has of such a channel's energy
    below_ridge_share: float  # channels whose own H_ii is below what the ridge adds, Cauchy inputs
    directions_above_ridge: int  # eigenvalues of H above the ridge, normal inputs
    fine_fresh_ratio: float  # fresh loss of rounding to nearest on as fine a grid as best's over RTN's, normal inputs


def measure(lab: ModuleType, setup: Any, *, progress: bool) -> Sweep:
    """Computes everything that results.json does not have."""
    bar = tqdm(
        total=len(RIDGES) + len(TOKENS) + len(OTHER_SEEDS) + 2,
        desc="README: other setups",
        unit="run",
        disable=not progress,
        leave=False,
    )

    normal, cauchy = lab.draw(setup, "normal"), lab.draw(setup, "cauchy")
    weight = normal.weight
    hessian = {"normal": normal.hessian, "cauchy": cauchy.hessian}

    def run(problem: Any, **changes: Any) -> Any:
        comparison = lab.compare(problem, dataclasses.replace(setup, **changes))
        bar.update()
        return comparison

    def drawn(distribution: str, **changes: Any) -> Any:
        return run(lab.draw(dataclasses.replace(setup, **changes), distribution), **changes).figures()

    with_ridge = {name: lab.damped(values, setup.ridge) for name, values in hessian.items()}

    def lab_loss(scheme: Any) -> float:
        loss: float = lab.total(lab.ops.quantization_loss(weight, scheme.dequantized, with_ridge["normal"]))
        return loss

    ridges = {}
    for ridge in RIDGES:
        comparison = run(normal, ridge=ridge)
        common_ratio = lab_loss(comparison.gptq) / lab_loss(comparison.rtn)
        ridges[ridge] = {**comparison.figures(), "common_ratio": common_ratio}
    tokens = {count: drawn("normal", tokens=count) for count in TOKENS}
    cauchy_seeds = {seed: drawn("cauchy", seed=seed) for seed in (setup.seed, *OTHER_SEEDS)}
    activation = run(cauchy, column_order="activation").figures()
    bar.close()

    standard, cauchy_standard = lab.compare(normal, setup), lab.compare(cauchy, setup)
    reference, fast = (
        lab.quantize(operator, weight.double(), hessian["normal"].double(), setup)[0]
        for operator in (lab.ops.gptq_reference, lab.ops.gptq)
    )
    errors = [(weight - scheme.dequantized).double().square().sum() for scheme in (standard.gptq, standard.rtn)]
    scales = lab.ops.rtn(weight, bits=setup.bits, group_size=setup.group_size, symmetric=setup.symmetric)[1]

    fine = lab.ops.rtn(weight, bits=setup.bits, group_size=setup.group_size, full_range=True, scale_method="mse")
    fine_loss = lab.total(
        lab.ops.quantization_loss(weight, lab.ops.dequantize(*fine, setup.group_size), normal.fresh_hessian)
    )

    def coupling(values: torch.Tensor) -> float:
        deviation = values.diagonal().double().sqrt()
        correlation = (values.double() / deviation / deviation.unsqueeze(1)).abs()
        return float((correlation.sum() - correlation.trace()) / (correlation.numel() - len(correlation)))

    energy = cauchy.inputs.double().square()
    diagonal = hessian["cauchy"].diagonal().double()
    top = diagonal.topk(10).indices
    cauchy_rtn = cauchy_standard.rtn
    channel_loss = (weight - cauchy_rtn.dequantized).double().square().sum(0) * diagonal
    eigenvalues = torch.linalg.eigvalsh(hessian["normal"].double())
    normal_ridge = setup.ridge * hessian["normal"].diagonal().double().mean()
    return Sweep(
        ridges=ridges,
        tokens=tokens,
        cauchy_seeds=cauchy_seeds,
        cauchy_activation=activation,
        reference_changes=int((reference != fast).sum()),
        error_growth=float(errors[0] / errors[1]),
        scale_correlation=rank_correlation(standard.rtn.row_loss, scales.double().square().sum(1)),
        coupling={name: coupling(values) for name, values in with_ridge.items()},
        top_token_share=float(energy.sum(0).max() / energy.sum()),
        top_channels_share=float(diagonal[top].sum() / diagonal.sum()),
        top_channels_loss=float(channel_loss[top].sum() / lab.total(cauchy_rtn.row_loss)),
        top_channels_peak=float((energy[top].max(1).values / energy[top].sum(1)).min()),
        below_ridge_share=float((diagonal < setup.ridge * diagonal.mean()).double().mean()),
        directions_above_ridge=int((eigenvalues > normal_ridge).sum()),
        fine_fresh_ratio=fine_loss / standard.rtn.fresh_loss,
    )


def summary(runs: Mapping[str, Any]) -> str:
    """The table of both runs."""
    rows: list[list[str]] = []
    for name, label in (("normal", "N(0, 1)"), ("cauchy", "Cauchy(0, 1)")):
        run = runs[name]
        for inputs, key in (("calibration", "loss"), ("fresh", "fresh_loss")):
            losses = [number(run[f"{key}_{scheme}"]) for scheme in SCHEMES]
            best_ratio = run[f"{key.removesuffix('loss')}best_ratio"]
            rows.append([f"{label}, {inputs}", *losses, fixed(run[f"{key}_ratio"]), fixed(best_ratio)])
        proxies = [f"{run[f'worst_row_perplexity_proxy_{scheme}']:.5f}" for scheme in SCHEMES]
        rows.append([f"{label}, worst-row perplexity proxy", *proxies, "", ""])
    return tables.table(["inputs", "RTN", "GPTQ", "best", "GPTQ / RTN", "best / GPTQ"], rows, numbers=True)


def listed(values: Iterable[float]) -> str:
    """The values as a phrase: 3 and 10."""
    return " and ".join(f"{value:g}" for value in values)


def first_answer(setup: Any, run: Mapping[str, Any], sweep: Sweep) -> SimpleNamespace:
    """The ratio, its reason, and the ridges with which the lab's ranges are met."""
    low, high = LAB_RATIO

    def met(figures: Mapping[str, Any], ratio: str) -> bool:
        return bool(low <= figures[ratio] <= high and figures["grid_change_share"] < LAB_SHARE)

    own = [ridge for ridge, figures in sweep.ridges.items() if met(figures, "loss_ratio")]
    common = [ridge for ridge, figures in sweep.ridges.items() if met(figures, "common_ratio")]
    tokens_within = [count for count, figures in sweep.tokens.items() if low <= figures["loss_ratio"] <= high]
    fresh_ratios = [
        figures["fresh_loss_ratio"] for sweeps in (sweep.ridges, sweep.tokens) for figures in sweeps.values()
    ]
    fresh = run["fresh_loss_ratio"]
    holds("the loss ratio is below the lab's range", run["loss_ratio"] < low)
    holds("the share of changed codes has two digits", run["grid_change_share"] >= LAB_SHARE)
    # A tie that is rounded the other way changes only the columns after it in its row.
    holds("the textbook form gives the same codes, ties aside", sweep.reference_changes < 2 * setup.columns)
    holds(
        "as many directions as inputs lie above the ridge", sweep.directions_above_ridge == setup.tokens < setup.columns
    )
    holds("the fresh ratio is the growth of the squared error", abs(sweep.error_growth / fresh - 1) < 0.01)
    holds("some ridge gives both of the lab's ranges, by either ratio", bool(own) and bool(common))
    holds("some number of inputs gives the lab's ratio", bool(tokens_within))
    holds("GPTQ approaches RTN with many inputs", sweep.tokens[TOKENS[-1]]["loss_ratio"] > 0.9)
    holds("no setup helps on fresh inputs", min(fresh, *fresh_ratios) > 1)
    ridge_rows = []
    for ridge, figures in sweep.ridges.items():
        ratios = [fixed(figures[key]) for key in ("loss_ratio", "common_ratio")]
        share = percent(figures["grid_change_share"])
        ridge_rows.append([f"{ridge:g}", *ratios, share, fixed(figures["fresh_loss_ratio"])])
    ratio_columns = ["ratio, own ridge in H", f"ratio, ridge {setup.ridge:g} in H"]
    return SimpleNamespace(
        ratio=fixed(run["loss_ratio"]),
        rtn=number(run["loss_rtn"]),
        gptq=number(run["loss_gptq"]),
        share=percent(run["grid_change_share"]),
        changes=run["n_grid_changes"],
        low=low,
        high=high,
        reference_changes=sweep.reference_changes,
        codes=setup.rows * setup.columns,
        free=setup.columns - setup.tokens,
        fresh=fixed(fresh),
        fresh_rtn=number(run["fresh_loss_rtn"]),
        fresh_gptq=number(run["fresh_loss_gptq"]),
        error_growth=fixed(sweep.error_growth),
        ridge_table=tables.table(
            ["ridge", *ratio_columns, "codes changed", "ratio, fresh inputs"], ridge_rows, numbers=True
        ),
        own=listed(own),
        common=listed(common),
        tokens_within=listed(tokens_within),
        token_table=setups_table("calibration inputs", sweep.tokens),
    )


def setups_table(header: str, setups: Mapping[int, Mapping[str, Any]]) -> str:
    """A table with one line per setup: ratio, codes changed, ratio on fresh inputs."""
    rows = []
    for key, figures in setups.items():
        ratios = fixed(figures["loss_ratio"]), fixed(figures["fresh_loss_ratio"])
        rows.append([str(key), ratios[0], percent(figures["grid_change_share"]), ratios[1]])
    return tables.table([header, "ratio", "codes changed", "ratio, fresh inputs"], rows, numbers=True)


def second_answer(setup: Any, run: Mapping[str, Any], sweep: Sweep) -> SimpleNamespace:
    """The rows that gain most, absolutely and relatively."""
    rtn, gptq = (torch.tensor(run[f"row_loss_{scheme}"], dtype=torch.float64) for scheme in ("rtn", "gptq"))
    gain, relative = rtn - gptq, 1 - gptq / rtn
    absolute_rank, relative_rank = rank_correlation(gain, rtn), rank_correlation(relative, rtn)
    most = gain.topk(TOP).indices.tolist()
    holds("the absolute gain goes with the RTN loss", absolute_rank > 0.9)
    holds("the relative gain goes only weakly with the RTN loss", abs(relative_rank) < 0.6)
    holds("every row gains", float(relative.min()) > 0)
    holds("the scales explain part of the RTN loss", 0.3 < sweep.scale_correlation < 0.9)
    rows = [
        [str(row), *(number(float(values[row])) for values in (rtn, gptq, gain)), percent(float(relative[row]))]
        for row in most
    ]
    return SimpleNamespace(
        free=setup.columns - setup.tokens,
        absolute_rank=absolute_rank,
        relative_rank=relative_rank,
        shared=len({*most} & {*rtn.topk(TOP).indices.tolist()}),
        top=TOP,
        table=tables.table(["row", "loss RTN", "loss GPTQ", "gain", "relative gain"], rows, numbers=True),
        least=percent(float(relative.min()), 0),
        most=percent(float(relative.max()), 0),
        mean=percent(float(relative.mean())),
        deviation=percent(float(relative.std())),
        scale_correlation=sweep.scale_correlation,
    )


def third_answer(setup: Any, normal: Mapping[str, Any], cauchy: Mapping[str, Any], sweep: Sweep) -> SimpleNamespace:
    """The effect of Cauchy inputs, and its reason."""
    ratios = [figures["loss_ratio"] for figures in sweep.cauchy_seeds.values()]
    activation = sweep.cauchy_activation["loss_ratio"]
    worse = sum(g > r for r, g in zip(cauchy["row_loss_rtn"], cauchy["row_loss_gptq"], strict=True))
    holds("GPTQ benefits less with Cauchy inputs, for every seed", min(ratios) > normal["loss_ratio"])
    holds("some rows are worse with GPTQ", worse > 0)
    holds("the coupling is weaker with Cauchy inputs", sweep.coupling["cauchy"] < sweep.coupling["normal"] / 2)
    holds("ten channels are most of the loss", min(sweep.top_channels_share, sweep.top_channels_loss) > 0.8)
    holds("one value dominates each of the outlier channels", sweep.top_channels_peak > PEAK)
    holds("most channels lie below the ridge", sweep.below_ridge_share > 0.5)
    holds("activation order helps, but not enough", normal["loss_ratio"] < activation < cauchy["loss_ratio"])
    holds("GPTQ is worse than RTN on fresh Cauchy inputs", cauchy["fresh_loss_ratio"] > 1)
    shown = {seed: sweep.cauchy_seeds[seed] for seed in (setup.seed, *SHOWN_SEEDS)}
    return SimpleNamespace(
        ratio=fixed(cauchy["loss_ratio"]),
        rtn=number(cauchy["loss_rtn"]),
        gptq=number(cauchy["loss_gptq"]),
        share=percent(cauchy["grid_change_share"]),
        normal_ratio=fixed(normal["loss_ratio"]),
        worse=worse,
        coupling_cauchy=sweep.coupling["cauchy"],
        coupling_normal=sweep.coupling["normal"],
        top_token=percent(sweep.top_token_share, 0),
        top_channels=percent(sweep.top_channels_share, 0),
        top_loss=percent(sweep.top_channels_loss, 0),
        peak=PEAK,
        below_ridge=percent(sweep.below_ridge_share, 0),
        activation=fixed(activation),
        first_seed=OTHER_SEEDS[0],
        last_seed=OTHER_SEEDS[-1],
        least=fixed(min(ratios)),
        most=fixed(max(ratios)),
        table=setups_table("seed", shown),
        fresh=fixed(cauchy["fresh_loss_ratio"]),
    )


def best_preset(normal: Mapping[str, Any], cauchy: Mapping[str, Any], sweep: Sweep) -> SimpleNamespace:
    """The gain of the best preset, and its limits."""

    def gains_everywhere(run: Mapping[str, Any]) -> bool:
        return all(best < gptq for best, gptq in zip(run["row_loss_best"], run["row_loss_gptq"], strict=True))

    normal_fresh, cauchy_fresh = (run["fresh_loss_best"] / run["fresh_loss_rtn"] for run in (normal, cauchy))
    next_to_fine = normal_fresh / sweep.fine_fresh_ratio
    activation = sweep.cauchy_activation["fresh_loss_ratio"]
    holds("best gains on the calibration inputs", max(normal["best_ratio"], cauchy["best_ratio"]) < 1)
    holds("best gains on every row", gains_everywhere(normal) and gains_everywhere(cauchy))
    holds("best is better than GPTQ on fresh inputs", max(normal["fresh_best_ratio"], cauchy["fresh_best_ratio"]) < 1)
    holds("best is worse than RTN on fresh inputs", min(normal_fresh, cauchy_fresh) > 1)
    holds("the finer grid alone helps on fresh inputs", sweep.fine_fresh_ratio < 0.8)
    holds(
        "next to RTN on a grid as fine best is about as bad as GPTQ next to RTN",
        abs(next_to_fine / normal["fresh_loss_ratio"] - 1) < 0.15,
    )
    holds("the order of columns helps on fresh Cauchy inputs", activation < cauchy["fresh_loss_ratio"])
    return SimpleNamespace(
        normal_best=fixed(normal["best_ratio"]),
        cauchy_best=fixed(cauchy["best_ratio"]),
        normal_fresh=fixed(normal_fresh),
        cauchy_fresh=fixed(cauchy_fresh),
        normal_gptq=fixed(normal["fresh_loss_ratio"]),
        cauchy_gptq=fixed(cauchy["fresh_loss_ratio"]),
        fine=fixed(sweep.fine_fresh_ratio),
        next_to_fine=fixed(next_to_fine),
        activation=fixed(activation),
    )


def render(setup: Any, results: Mapping[str, Any], manifest: Mapping[str, Any], sweep: Sweep) -> str:
    """The whole page: the template with the figures filled in."""
    normal, cauchy = results["runs"]["normal"], results["runs"]["cauchy"]
    # The exact time differs from run to run; the manifest has it.
    seconds = max(run["gptq"] for run in manifest["seconds"].values())
    holds(f"a layer takes less than {LAB_SECONDS} s", seconds < LAB_SECONDS)
    page = TEMPLATE.read_text(encoding="utf-8").format(
        setup=setup,
        page=SimpleNamespace(
            summary=summary(results["runs"]),
            lab_seconds=LAB_SECONDS,
            seconds=next(step for step in TIME_STEPS if seconds < step),
        ),
        first=first_answer(setup, normal, sweep),
        second=second_answer(setup, normal, sweep),
        third=third_answer(setup, normal, cauchy, sweep),
        best=best_preset(normal, cauchy, sweep),
    )
    return reflow(page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit code."""
    parser = argparse.ArgumentParser(description="Writes the README.md of the lab's folder from its results.")
    parser.add_argument("folder", type=Path, nargs="?", default=LAB, help="has results.json and manifest.json")
    parser.add_argument("--output", type=Path, help="default: README.md in the folder")
    options = parser.parse_args(arguments)
    results, manifest = (json.loads((options.folder / name).read_text()) for name in ("results.json", "manifest.json"))
    # A folder whose name is no identifier: `import` cannot name it.
    lab = importlib.import_module(f"{__package__}.gptq_toy")
    setup = lab.Setup.of_results(results)
    sweep = measure(lab, setup, progress=sys.stderr.isatty())
    try:
        text = render(setup, results, manifest, sweep)
    except UnsupportedError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    (options.output or options.folder / "README.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
