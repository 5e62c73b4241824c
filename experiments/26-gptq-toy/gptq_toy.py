"""GPTQ and its best preset against round-to-nearest on one Linear layer, from Python through torch.ops.miniquant.

    python experiments/26-gptq-toy/gptq_toy.py                        # the lab: normal inputs, then Cauchy inputs
    python experiments/26-gptq-toy/gptq_toy.py --check results.json   # the same, compared with the driver's figures
    python experiments/26-gptq-toy/gptq_toy.py --preset fast          # GPTQ with other options
    python experiments/26-gptq-toy/gptq_toy.py --ridge auto           # each run with a ridge from its inputs

Weights W [N, K] are normal with standard deviation 0.02, calibration inputs X [K, n] are normal or Cauchy, both from
the default CPU generator in this order; H = X X^T / n. The loss of a row is e H e^T, e = w - dequantize(quantize(w)),
with the same H as in GPTQ, including the ridge. The worst-case-row perplexity proxy is exp of the largest relative
output error of a row,

    exp(max over rows r of (e_r H e_r^T) / (w_r H w_r^T)).

Fresh inputs, drawn right after X, measure every scheme on inputs that none has seen; their H has no ridge.

The schemes: RTN on the plain grid; GPTQ with the setup's options, by default the lab's; best, which is GPTQ with
miniquant.preset("best"). With the ridge "auto" miniquant.gptq_auto chooses a ridge for every run, which best also uses.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

import miniquant
from miniquant.presets import Preset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

ops = torch.ops.miniquant

DISTRIBUTIONS = ("normal", "cauchy")
WEIGHT_DEVIATION = 0.02
TOP_ROWS = 10
LEAST_LOSS = "least held-out loss"
ROUNDS_TO_NEAREST = "none gains on rounding to nearest"
PRESET_OPTIONS = ("column_order", "group_scales", "scale_method", "full_range", "beam_scales", "refine")


@dataclass(frozen=True)
class Setup:
    """The setup of a comparison. The defaults are the lab's; the names are those of `setup` in results.json."""

    rows: int = 768
    columns: int = 768
    tokens: int = 128
    fresh_tokens: int = 8192
    bits: int = 4
    group_size: int = 64
    symmetric: bool = True
    ridge: float | Literal["auto"] = 0.01
    block_size: int = 128
    group_scales: str = "static"
    column_order: str = "natural"
    scale_method: str = "absmax"
    full_range: bool = False
    beam_scales: int = 0
    refine: int = 0
    seed: int = 42

    @classmethod
    def of_results(cls, results: Mapping[str, Any]) -> Setup:
        """The setup that a results.json was made with."""
        setup = results["setup"]
        missing = [field.name for field in dataclasses.fields(cls) if field.name not in setup]
        if missing:
            raise ValueError(f"results: expected setup to name {', '.join(missing)}, but it has {', '.join(setup)}")
        return cls(**{field.name: setup[field.name] for field in dataclasses.fields(cls)})

    def with_preset(self, name: Preset) -> Setup:
        """The same setup with the options of a preset."""
        options = {option: getattr(Setup, option) for option in PRESET_OPTIONS} | miniquant.preset(name)
        # full_range is an option of symmetric grids only; an asymmetric grid already uses all codes.
        return dataclasses.replace(self, **options | {"full_range": options["full_range"] and self.symmetric})


@dataclass(frozen=True)
class Problem:
    """A layer and its inputs."""

    weight: torch.Tensor  # [N, K]
    inputs: torch.Tensor  # [K, n]
    fresh: torch.Tensor | None  # [K, fresh tokens]

    @cached_property
    def hessian(self) -> torch.Tensor:
        """H of the calibration inputs, without a ridge."""
        return hessian_of(self.inputs)

    @cached_property
    def fresh_hessian(self) -> torch.Tensor | None:
        """H of the fresh inputs."""
        return None if self.fresh is None else hessian_of(self.fresh)


@dataclass(frozen=True)
class Scheme:
    """A quantized weight and its losses."""

    codes: torch.Tensor  # int8 [N, K]
    dequantized: torch.Tensor  # [N, K]
    row_loss: torch.Tensor  # [N], on the calibration inputs, H with its ridge
    fresh_loss: float | None  # on the fresh inputs, H without a ridge
    proxy: float | None  # worst-case-row perplexity proxy


@dataclass(frozen=True)
class Comparison:
    """All three schemes on one problem."""

    rtn: Scheme
    gptq: Scheme
    best: Scheme
    ridge: float
    ridge_added: float
    ridge_choice: dict[str, Any] | None  # how the ridge was found, as results.json has it

    def figures(self) -> dict[str, Any]:
        """The run in the format of results.json."""
        schemes = {"rtn": self.rtn, "gptq": self.gptq, "best": self.best}
        rows = {name: scheme.row_loss.tolist() for name, scheme in schemes.items()}
        loss = {name: total(scheme.row_loss) for name, scheme in schemes.items()}
        fresh = {name: scheme.fresh_loss for name, scheme in schemes.items()}
        changes = int((self.rtn.codes != self.gptq.codes).sum())

        def each(figure: str, values: Mapping[str, Any]) -> dict[str, Any]:
            return {f"{figure}_{name}": value for name, value in values.items()}

        return {
            **each("loss", loss),
            "loss_ratio": ratio(loss["gptq"], loss["rtn"]),
            "best_ratio": ratio(loss["best"], loss["gptq"]),
            "n_grid_changes": changes,
            "grid_change_share": ratio(changes, self.rtn.codes.numel()),
            **each("fresh_loss", fresh),
            "fresh_loss_ratio": ratio(fresh["gptq"], fresh["rtn"]),
            "fresh_best_ratio": ratio(fresh["best"], fresh["gptq"]),
            **each("worst_row_perplexity_proxy", {name: scheme.proxy for name, scheme in schemes.items()}),
            "rows_improved": sum(gptq < rtn for rtn, gptq in zip(rows["rtn"], rows["gptq"], strict=True)),
            "ridge": self.ridge,
            "ridge_added": self.ridge_added,
            "ridge_choice": self.ridge_choice,
            **each("codes_sha256", {name: sha256(scheme.codes) for name, scheme in schemes.items()}),
            "top_rows_absolute": top_rows(rows["rtn"], rows["gptq"], relative=False),
            "top_rows_relative": top_rows(rows["rtn"], rows["gptq"], relative=True),
            **each("row_loss", rows),
        }


def draw(setup: Setup, distribution: str) -> Problem:
    """The lab's layer and inputs. The generator is seeded again, so every distribution has the same weights."""
    torch.manual_seed(setup.seed)
    weight = torch.randn(setup.rows, setup.columns) * WEIGHT_DEVIATION

    def samples(count: int) -> torch.Tensor:
        if distribution == "normal":
            return torch.randn(setup.columns, count)
        return torch.empty(setup.columns, count).cauchy_()

    inputs = samples(setup.tokens)
    return Problem(weight, inputs, samples(setup.fresh_tokens) if setup.fresh_tokens else None)


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    """X X^T / n of inputs [K, n], whose columns are tokens."""
    columns, tokens = inputs.shape
    hessian = torch.zeros(columns, columns, dtype=inputs.dtype)
    ops.hessian_update_(hessian, inputs.t())
    return hessian / tokens


def damped(hessian: torch.Tensor, ridge: float) -> torch.Tensor:
    """H + ridge * mean(diag H) * I, as ops.gptq adds it."""
    result = hessian.clone()
    result.diagonal().add_(ridge_added(hessian, ridge))
    return result


def ridge_added(hessian: torch.Tensor, ridge: float) -> float:
    """What the ridge adds to every diagonal element: ridge * mean(diag H)."""
    return ridge * (total(hessian.diagonal()) / len(hessian))


def total(values: torch.Tensor) -> float:
    """The sum in float64, in the order of the values."""
    result = 0.0
    for value in values.tolist():
        result += value  # sum() compensates for rounding from Python 3.12 on, which the driver does not
    return result


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """The quotient; None if a value is missing or the denominator is 0."""
    if numerator is None or denominator is None or denominator == 0:
        return None
    return numerator / denominator


def worst_row_perplexity_proxy(row_loss: torch.Tensor, row_energy: torch.Tensor) -> float | None:
    """The exp of the largest loss relative to its row's energy, rows without energy left out."""
    relative = [ratio(loss, energy) for loss, energy in zip(row_loss.tolist(), row_energy.tolist(), strict=True)]
    finite = [value for value in relative if value is not None]
    return math.exp(max(finite)) if finite else None


def top_rows(loss_rtn: Sequence[float], loss_gptq: Sequence[float], *, relative: bool) -> list[dict[str, float]]:
    """The rows that gain most, largest gain first."""
    rows: list[dict[str, float]] = []
    for row, (rtn, gptq) in enumerate(zip(loss_rtn, loss_gptq, strict=True)):
        left = ratio(gptq, rtn)
        if left is not None or not relative:
            gain = 1.0 - left if relative and left is not None else rtn - gptq
            rows.append({"row": row, "loss_rtn": rtn, "loss_gptq": gptq, "gain": gain})
    return sorted(rows, key=lambda entry: entry["gain"], reverse=True)[:TOP_ROWS]


def sha256(codes: torch.Tensor) -> str:
    """The SHA-256 of the int8 codes, row by row."""
    return hashlib.sha256(codes.contiguous().numpy().tobytes()).hexdigest()


def options_of(setup: Setup) -> dict[str, Any]:
    """The setup's options of GPTQ, except the ridge."""
    return {name: getattr(setup, name) for name in ("bits", "group_size", "symmetric", "block_size", *PRESET_OPTIONS)}


def quantize(
    operator: Callable[..., tuple[torch.Tensor, ...]], weight: torch.Tensor, hessian: torch.Tensor, setup: Setup
) -> tuple[torch.Tensor, ...]:
    """Runs ops.gptq or ops.gptq_reference with the setup's options: codes, scales, zero points and loss per row."""
    return operator(weight, hessian, ridge=setup.ridge, **options_of(setup))


def ridge_choice(accumulator: miniquant.HessianAccumulator, automatic: miniquant.AutoGptqResult) -> dict[str, Any]:
    """How the ridge was chosen from the data, in the format of results.json."""
    choice = automatic.choice
    return {
        "ridges": list(choice.ridges),
        "held_out": [loss if math.isfinite(loss) else None for loss in choice.held_out],
        "half_tokens": [accumulator.half_tokens(0), accumulator.half_tokens(1)],
        "chosen": choice.ridge,
        "reason": ROUNDS_TO_NEAREST if choice.ridge == choice.ridges[-1] else LEAST_LOSS,
        "failed": list(automatic.failed),
    }


def compare(problem: Problem, setup: Setup) -> Comparison:
    """Quantizes the weight with every scheme and measures the losses."""
    weight, fresh = problem.weight, problem.fresh_hessian
    choice: dict[str, Any] | None = None
    if setup.ridge != "auto":
        ridge, hessian = setup.ridge, problem.hessian
        gptq = quantize(ops.gptq, weight, hessian, setup)
    else:
        accumulator = miniquant.HessianAccumulator(setup.columns, halves=True)
        accumulator.update(problem.inputs.t())
        automatic = miniquant.gptq_auto(weight, accumulator, **options_of(setup))
        ridge, hessian, gptq = automatic.ridge, accumulator.hessian(), automatic.tensors
        choice = ridge_choice(accumulator, automatic)
    best = quantize(ops.gptq, weight, hessian, dataclasses.replace(setup.with_preset("best"), ridge=ridge))
    with_ridge = damped(hessian, ridge)
    # w H w^T per row: the loss of a weight that is all zeros.
    energy = ops.quantization_loss(weight, torch.zeros_like(weight), with_ridge)

    def scheme(codes: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, *_: torch.Tensor) -> Scheme:
        dequantized = ops.dequantize(codes, scales, zero_points, setup.group_size)
        row_loss = ops.quantization_loss(weight, dequantized, with_ridge)
        fresh_loss = None if fresh is None else total(ops.quantization_loss(weight, dequantized, fresh))
        return Scheme(codes, dequantized, row_loss, fresh_loss, worst_row_perplexity_proxy(row_loss, energy))

    rtn = ops.rtn(weight, bits=setup.bits, group_size=setup.group_size, symmetric=setup.symmetric)
    return Comparison(scheme(*rtn), scheme(*gptq), scheme(*best), ridge, ridge_added(hessian, ridge), choice)


def report(distribution: str, comparison: Comparison) -> str:
    """A readable table of the losses and the worst-case-row perplexity proxy of every scheme."""
    figures = comparison.figures()
    schemes = (comparison.rtn, comparison.gptq, comparison.best)
    losses = torch.stack([scheme.row_loss for scheme in schemes])
    rows = [entry["row"] for entry in figures["top_rows_absolute"]]

    def line(label: str, *cells: float | None) -> str:
        return f"  {label:<28}" + "".join(f"{'-' if cell is None else format(cell, '.6g'):>12}" for cell in cells)

    def loss_line(label: str, prefix: str) -> str:
        columns = ("loss_rtn", "loss_gptq", "loss_best", "loss_ratio", "best_ratio")
        return line(label, *(figures[prefix + column] for column in columns))

    return "\n".join(
        [
            f"X ~ {distribution}, ridge {comparison.ridge:g}",
            "  loss per row [RTN; GPTQ; best]:",
            *("  " + text for text in str(losses).splitlines()),
            f"  {'':28}{'RTN':>12}{'GPTQ':>12}{'best':>12}{'GPTQ / RTN':>12}{'best / GPTQ':>13}",
            loss_line("loss, calibration inputs", ""),
            loss_line("loss, fresh inputs", "fresh_"),
            line("worst-row perplexity proxy", *(scheme.proxy for scheme in schemes)),
            f"  codes that differ: {figures['n_grid_changes']} ({figures['grid_change_share']:.3%})",
            f"  rows that gain most: {', '.join(map(str, rows))}",
        ]
    )


def differences(name: str, expected: Any, found: Any) -> Iterator[tuple[str, float, str]]:
    """Every single figure: its name, the relative difference, and both values."""
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            yield name, math.inf, f"{len(expected)} and {len(found)} values"
            return
        for index, (left, right) in enumerate(zip(expected, found, strict=True)):
            yield from differences(f"{name}[{index}]", left, right)
    elif isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            yield from differences(f"{name}.{key}", expected.get(key), found.get(key))
    elif isinstance(expected, float | int) and isinstance(found, float | int):
        scale = max(abs(expected), abs(found))
        yield name, abs(expected - found) / scale if scale else 0.0, f"{expected!r} and {found!r}"
    else:
        shown = [text if len(text) < 80 else text[:76] + " ..." for text in (repr(expected), repr(found))]
        yield name, 0.0 if expected == found else math.inf, " and ".join(shown)


def check(results: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]], tolerance: float) -> list[str]:
    """The figures that differ between results.json and these runs by more than the tolerance."""
    problems = []
    for run, figures in runs.items():
        if run not in results["runs"]:
            problems.append(f"{run}: not in results.json, which has {', '.join(results['runs'])}")
            continue
        for name, found in figures.items():
            for figure, difference, values in differences(name, results["runs"][run].get(name), found):
                if not difference <= tolerance:  # NaN differs from everything
                    problems.append(f"{run}.{figure}: results.json and this script say {values}")
    return problems


def ridge_in(text: str) -> float | Literal["auto"]:
    """A ridge of the command line."""
    if text == "auto":
        return "auto"
    try:
        ridge = float(text)
    except ValueError:
        ridge = math.nan
    if not 0 <= ridge < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of at least 0, or auto, but got '{text}'")
    return ridge


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options; options of the setup that are not given are None."""
    parser = argparse.ArgumentParser(
        prog="gptq_toy.py",
        description="Compares GPTQ and its best preset with round-to-nearest on one synthetic Linear layer.",
    )
    for field in dataclasses.fields(Setup):
        kinds = {"int": int, "float": float, "str": str}
        if field.type in kinds:
            parser.add_argument(
                "--" + field.name.replace("_", "-"), type=kinds[str(field.type)], help=f"default: {field.default}"
            )
    parser.add_argument(
        "--ridge",
        type=ridge_in,
        metavar="FLOAT|auto",
        help=f"relative to the mean of diag(H), or chosen from the inputs (default: {Setup.ridge})",
    )
    parser.add_argument(
        "--preset",
        choices=get_args(Preset),
        help="preset that GPTQ's options start from (default: the setup)",
    )
    parser.add_argument(
        "--full-range", action=argparse.BooleanOptionalAction, help="one more code on the negative side"
    )
    parser.add_argument(
        "--asymmetric", action="store_const", const=False, dest="symmetric", help="a grid with zero points"
    )
    parser.add_argument(
        "--distribution", choices=(*DISTRIBUTIONS, "both"), default="both", help="of the inputs (default: both)"
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="RESULTS",
        help="take the setup from this results.json and compare with its figures; exit status 1 if they differ",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="relative difference that --check allows in a figure; codes must always agree (default: none)",
    )
    return parser.parse_args(arguments)


def setup_of(options: argparse.Namespace, start: Setup) -> Setup:
    """The setup `start`, changed by the given options."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Setup)}
    given = {name: value for name, value in given.items() if value is not None}
    setup = dataclasses.replace(start, **given)
    return dataclasses.replace(setup.with_preset(options.preset), **given) if options.preset else setup


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints and compares; returns the exit code."""
    options = parse_arguments(arguments)
    results = json.loads(options.check.read_text()) if options.check else None
    setup = setup_of(options, Setup.of_results(results) if results else Setup())
    names = DISTRIBUTIONS if options.distribution == "both" else (options.distribution,)
    runs = {}
    for name in names:
        comparison = compare(draw(setup, name), setup)
        print(report(name, comparison))
        runs[name] = comparison.figures()
    if results:
        problems = check(results, runs, options.tolerance)
        if problems:
            print(f"\n{options.check}: {len(problems)} figures differ", *problems[:20], sep="\n  ", file=sys.stderr)
            return 1
        print(f"\n{options.check}: every code and every figure agrees")
    return 0


if __name__ == "__main__":
    sys.exit(main())
