"""Draws loss_curve.png, the per-row losses of the three schemes, from the results.json of the lab comparison.

python -m experiments.26-gptq-toy.plot [RESULTS]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from benchmarks.common.figures import STYLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

LAB = Path(__file__).resolve().parent

# Readers with any colour vision can tell orange, blue and this green apart; the medians are darker tones.
RTN_COLOUR = "#d9730d"
GPTQ_COLOUR = "#1f5fa8"
BEST_COLOUR = "#14a382"
MEDIAN_COLOURS = {"GPTQ": "#0b2f57", "best": "#06503f"}
LABELS = {"RTN": "RTN", "GPTQ": "GPTQ", "best": "GPTQ, best preset"}
TITLES = {"normal": "Normal inputs, X ~ N(0, 1)", "cauchy": "Cauchy inputs, X ~ Cauchy(0, 1)"}
# The scale is logarithmic if the largest row is more than this many times the smallest.
LINEAR_SPAN = 20.0
MEDIAN_WINDOW = 49


def running_median(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The running median of `window` neighbours, of fewer at the ends."""
    half = window // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def number(value: float) -> str:
    """Four digits, never an exponent for a large value."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def draw_rows(axes: Axes, rows: Mapping[str, NDArray[np.float64]], *, sort: bool) -> None:
    """All schemes' rows in one panel, by row index or sorted by the loss of RTN."""
    rtn = rows["RTN"]
    order = np.argsort(rtn, kind="stable") if sort else np.arange(len(rtn))
    x = np.arange(len(rtn))
    dots: dict[str, Any] = {"linestyle": "", "marker": ".", "markersize": 4.5, "markeredgewidth": 0}
    axes.plot(x, rtn[order], color=RTN_COLOUR, label="RTN", **({"linewidth": 2.2} if sort else dots))
    for name, colour in (("GPTQ", GPTQ_COLOUR), ("best", BEST_COLOUR)):
        axes.plot(x, rows[name][order], color=colour, label=LABELS[name], **dots)
    if sort:
        for name, colour in MEDIAN_COLOURS.items():
            median = running_median(rows[name][order], MEDIAN_WINDOW)
            axes.plot(x, median, color=colour, linewidth=1.6, label=f"{name}, median of {MEDIAN_WINDOW} rows")
    axes.set_xlabel("rank of the row by its RTN loss" if sort else "row index")
    losses = np.concatenate(list(rows.values()))
    if losses.min() > 0 and losses.max() / losses.min() > LINEAR_SPAN:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, losses.max() * 1.05)
    axes.set_xlim(-len(rtn) * 0.01, len(rtn) * 1.01)


def draw(source: Path, path: Path) -> None:
    """Draws one line of panels per run of a results.json: rows as stored, and sorted by the loss of RTN."""
    content = source.read_bytes()
    results = json.loads(content)
    setup, runs = results["setup"], results["runs"]
    with mpl.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(runs), 2, figsize=(12, 4.3 * len(runs) + 0.9), squeeze=False, sharey="row", layout="constrained"
        )
        for panels, (name, run) in zip(grid, runs.items(), strict=True):
            rows = {
                scheme: np.asarray(run[f"row_loss_{scheme.lower()}"], dtype=np.float64)
                for scheme in ("RTN", "GPTQ", "best")
            }
            title = TITLES.get(name, name)
            totals = " → ".join(number(run[f"loss_{scheme.lower()}"]) for scheme in rows)
            for axes, sort in zip(panels, (False, True), strict=True):
                draw_rows(axes, rows, sort=sort)
            scale = ", log scale" if panels[0].get_yscale() == "log" else ""
            panels[0].set_title(f"{title}: rows as stored", loc="left")
            panels[1].set_title(f"sorted by RTN loss (total {totals})", loc="left")
            panels[0].set_ylabel(f"row loss  $e\\,H\\,e^T$  (squared output units{scale})")
        handles, labels = grid[0, 1].get_legend_handles_labels()
        handles[0], labels[0] = grid[0, 0].get_legend_handles_labels()[0][0], "RTN"
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, markerscale=2.5, fontsize=11)
        figure.suptitle(
            f"Quantization loss per row, {setup['rows']} x {setup['columns']} layer, INT{setup['bits']}, "
            f"group {setup['group_size']}, {setup['tokens']} calibration inputs",
            x=0.01,
            ha="left",
            fontsize=13,
            fontweight="bold",
        )
        # Without date and version the same figures give the same bytes. Source identifies the figures.
        metadata = {"Software": None, "Source": f"{source.name} sha256 {hashlib.sha256(content).hexdigest()}"}
        figure.savefig(path, dpi=130, metadata=metadata)
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the plot; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draws the per-row losses of the three schemes from results.json.")
    parser.add_argument("results", type=Path, nargs="?", default=LAB / "results.json", help="default: the lab's")
    parser.add_argument("--output", type=Path, help="default: loss_curve.png beside the results")
    options = parser.parse_args(arguments)
    draw(options.results, options.output or options.results.with_name("loss_curve.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
