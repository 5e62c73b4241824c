"""Writes docs/quality.md and docs/quality.png from quality.json; all tables and figures come from that file.

Each part of the page between `<!-- begin NAME -->` and `<!-- end -->` is regenerated; the text around these parts is
written by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from benchmarks.common.figures import STYLE
from benchmarks.common.measuring import RESULTS, ROOT
from benchmarks.common.tables import table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from matplotlib.axes import Axes

DOCS = ROOT / "docs"
PART = re.compile(r"(<!-- begin (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SOURCE = RESULTS / "quality.json"
PLAIN = "plain GPTQ"
RTN = "RTN"
# Our scheme that is compared with the peers' on each kind of grid.
OURS = {"symmetric": "best", "asymmetric": "best, asymmetric"}
# Marks the peers' variants whose groups are not made of columns in stored order.
ORDERED_GROUPS = "groups of ordered columns"
KINDS = {"calibration": "calibration", "held_out": "held-out"}
# Distinct for readers with any colour vision (Okabe and Ito), and in a fixed order.
COLOURS = ("#d9730d", "#7f7f7f", "#56b4e9", "#cc79a7", "#009e73", "#1f5fa8", "#0b2f57", "#8c564b")


def grid_name(bits: int, *, symmetric: bool) -> str:
    """The name of a grid in quality.json."""
    return f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}"


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))


def relative(losses: Sequence[float], base: Sequence[float]) -> float:
    """The geometric mean over layers of one loss relative to another."""
    return geometric_mean(a / b for a, b in zip(losses, base, strict=True))


def number_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of numbers, with a final newline."""
    return table(header, rows, numbers=True) + "\n"


def setup_part(results: dict[str, Any]) -> str:
    """The model, the sizes, the versions and the machine."""
    setup, seconds, peers = results["setup"], results["seconds"], results["peers"]
    versions = f", {', '.join(f'{name} {version}' for name, version in peers['versions'].items())}" if peers else ""
    return (
        f"`{setup['model']}`, {len(setup['layers'])} Linear layers, {setup['tokens']:,} calibration tokens, "
        f"{setup['fresh_tokens']:,} held-out tokens, {setup['texts']} held-out texts; group {setup['group_size']}, "
        f"ridge {setup['ridge']}; miniquant {setup['miniquant']}, torch {setup['torch']}{versions}; "
        f"{setup['processor']}, {seconds['threads']} threads.\n"
    )


def losses_part(results: dict[str, Any]) -> str:
    """Losses relative to plain GPTQ, by scheme and bits, and times."""
    by_bits, seconds = results["losses"], results["seconds"]
    header = ["scheme"]
    header += [f"{bits} bits, {kind}" for bits in by_bits for kind in KINDS.values()]
    header += [f"worst layer, {next(iter(by_bits))} bits, held-out", "time"]
    rows = []
    for scheme in next(iter(by_bits.values())):
        cells = [
            f"{relative(schemes[scheme][kind], schemes[PLAIN][kind]):.3f}"
            for schemes in by_bits.values()
            for kind in KINDS
        ]
        first = next(iter(by_bits.values()))
        worst = max(a / b for a, b in zip(first[scheme]["held_out"], first[PLAIN]["held_out"], strict=True))
        taken = seconds["schemes"].get(scheme)
        time = "" if taken is None else f"{taken / seconds['schemes'][PLAIN]:.2f}"
        rows.append([scheme, *cells, f"{worst:.3f}", time])
    shape = f"{seconds['rows']} x {seconds['columns']}, group {seconds['group_size']}"
    return number_table(header, rows) + (
        f"\nTime: of `gptq` on one layer of {shape}, 4 bits, relative to plain GPTQ's "
        f"{seconds['schemes'][PLAIN]:.2f} s; the shortest of {seconds['rounds']} runs.\n"
    )


def few_tokens_part(results: dict[str, Any]) -> str:
    """Losses with few calibration tokens, relative to plain GPTQ and to RTN."""
    schemes = results["few_tokens"]
    header = ["scheme", "calibration / plain's", "held-out / plain's", "held-out / RTN's"]
    rows = []
    for scheme, losses in schemes.items():
        cells = [relative(losses[kind], schemes[PLAIN][kind]) for kind in KINDS]
        cells.append(relative(losses["held_out"], schemes[RTN]["held_out"]))
        rows.append([scheme, *(f"{cell:.3f}" for cell in cells)])
    return f"{results['setup']['few_tokens']} calibration tokens, 4 bits:\n\n" + number_table(header, rows)


def best_ridges(measured: dict[str, Any]) -> list[tuple[str, float]]:
    """For each layer the ridge with the lowest held-out loss, and that loss."""
    ridges = measured["ridges"]
    losses = zip(*ridges.values(), strict=True)
    return [min(zip(ridges, of_layer, strict=True), key=lambda pair: pair[1]) for of_layer in losses]


def ridges_part(results: dict[str, Any]) -> str:
    """Held-out losses relative to RTN by ridge and tokens."""
    nearest = results["ridges"]["rtn"]
    parts = []
    for scheme, by_tokens in results["ridges"]["schemes"].items():
        first = next(iter(by_tokens.values()))
        header = ["tokens", *first["ridges"], "best of these for each layer", "from the data", "worst layer / its best"]
        rows = []
        for tokens, measured in by_tokens.items():
            best = [loss for _, loss in best_ridges(measured)]
            columns = [*measured["ridges"].values(), best, measured["chosen"]]
            cells = [relative(column, nearest) for column in columns]
            cells.append(max(a / b for a, b in zip(measured["chosen"], best, strict=True)))
            rows.append([tokens, *(f"{cell:.3f}" for cell in cells)])
        parts.append(f"{scheme}, 4 bits, held-out loss relative to RTN's by ridge:\n\n" + number_table(header, rows))
    return "\n".join(parts)


def best_ridges_part(results: dict[str, Any]) -> str:
    """The number of layers for which each ridge is best, then the best ridge of every layer."""
    by_tokens = results["ridges"]["schemes"][PLAIN]
    ridges = list(next(iter(by_tokens.values()))["ridges"])
    best = {tokens: [ridge for ridge, _ in best_ridges(measured)] for tokens, measured in by_tokens.items()}
    counts = number_table(
        ["tokens", *ridges],
        [[tokens, *(str(found.count(ridge)) for ridge in ridges)] for tokens, found in best.items()],
    )
    layers = results["setup"]["layers"]
    each = number_table(
        ["layer", *(f"{tokens} tokens" for tokens in best)],
        [[f"`{layer}`", *(found[i] for found in best.values())] for i, layer in enumerate(layers)],
    )
    return (
        f"{PLAIN}, layers for which a ridge is the best of these:\n\n{counts}\n"
        f"<details><summary>The best ridge of each layer</summary>\n\n{each}\n</details>\n"
    )


def embeddings_part(results: dict[str, Any]) -> str:
    """How near the quantized model's embeddings are to the float model's."""
    by_bits = results["embeddings"]
    figures = {"mean_cosine": "cosine", "spearman": "Spearman"}
    header = ["scheme", *(f"{bits} bits, {name}" for bits in by_bits for name in figures.values())]
    rows = [
        [scheme, *(f"{schemes[scheme][figure]:.4f}" for schemes in by_bits.values() for figure in figures)]
        for scheme in next(iter(by_bits.values()))
    ]
    return number_table(header, rows)


def peers_ratio(results: dict[str, Any], grid: str, kind: str, *, ordered_groups: bool) -> float:
    """Our best scheme relative to each layer's best peer, with or without variants that reorder groups."""
    bits, _, symmetry = grid.split(maxsplit=2)
    ours = results["losses"][bits][OURS[symmetry]][kind]
    variants = [
        losses[kind]
        for name, losses in results["peers"]["losses"][grid].items()
        if ordered_groups or ORDERED_GROUPS not in name
    ]
    return relative(ours, [min(of_layer) for of_layer in zip(*variants, strict=True)])


def peers_part(results: dict[str, Any]) -> str:
    """Our best scheme and the peers, or a note that the peers were not measured."""
    peers = results["peers"]
    if peers is None:
        return "The peers were not measured: their environment was missing.\n"
    header = ["best / best peer"]
    header += [f"{what}, {kind}" for what in ("groups as stored", "any groups") for kind in KINDS.values()]
    ratios = number_table(
        header,
        [
            [
                grid,
                *(
                    f"{peers_ratio(results, grid, kind, ordered_groups=ordered_groups):.3f}"
                    for ordered_groups in (False, True)
                    for kind in KINDS
                ),
            ]
            for grid in peers["losses"]
        ],
    )
    grids = [(grid, *grid.split(maxsplit=2)[::2]) for grid in peers["losses"]]
    variants = list(dict.fromkeys(variant for losses in peers["losses"].values() for variant in losses))
    rows = []
    for variant in variants:
        cells = [
            relative(peers["losses"][grid][variant]["held_out"], results["losses"][bits][PLAIN]["held_out"])
            for grid, bits, _ in grids
        ]
        rows.append([variant, *(f"{cell:.3f}" for cell in cells)])
    cells = [
        relative(results["losses"][bits][OURS[symmetry]]["held_out"], results["losses"][bits][PLAIN]["held_out"])
        for _, bits, symmetry in grids
    ]
    rows.append(["miniquant, best", *(f"{cell:.3f}" for cell in cells)])
    each = number_table(["held-out loss relative to plain GPTQ's", *peers["losses"]], rows)
    return f"{ratios}\n{each}"


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "setup": setup_part,
    "losses": losses_part,
    "few_tokens": few_tokens_part,
    "ridges": ridges_part,
    "best_ridges": best_ridges_part,
    "embeddings": embeddings_part,
    "peers": peers_part,
}


def page(template: str, results: dict[str, Any]) -> str:
    """The page with its generated parts replaced."""
    return PART.sub(lambda part: f"{part[1]}{PARTS[part['name']](results)}{part[3]}", template)


def log_ticks(axes: Axes) -> None:
    """Makes an axis logarithmic, with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def places(count: int, position: int) -> list[float]:
    """The x positions of the schemes of one number of bits."""
    return [position + (i - (count - 1) / 2) * 0.8 / count for i in range(count)]


def draw_losses(axes: Axes, results: dict[str, Any]) -> None:
    """Each layer's held-out loss relative to plain GPTQ's, and the geometric means."""
    for position, schemes in enumerate(results["losses"].values()):
        for x, colour, losses in zip(places(len(schemes), position), COLOURS, schemes.values(), strict=True):
            ratios = [a / b for a, b in zip(losses["held_out"], schemes[PLAIN]["held_out"], strict=True)]
            axes.plot([x] * len(ratios), ratios, ".", color=colour, alpha=0.5, markersize=5, markeredgewidth=0)
            axes.plot([x], [geometric_mean(ratios)], "_", color=colour, markersize=16, markeredgewidth=3)
    log_ticks(axes)
    axes.set_xticks(range(len(results["losses"])), [f"{bits} bits" for bits in results["losses"]])
    axes.set_ylabel("held-out loss / plain GPTQ's  (log scale)")
    axes.set_title("Layers (dots) and their geometric mean (bars)", loc="left")


def draw_ridges(axes: Axes, results: dict[str, Any]) -> None:
    """Held-out losses relative to RTN's as calibration tokens grow, by ridge."""
    nearest = results["ridges"]["rtn"]
    by_tokens = results["ridges"]["schemes"][PLAIN]
    counts = [int(tokens) for tokens in by_tokens]
    ridges = list(next(iter(by_tokens.values()))["ridges"])
    shades = mpl.colormaps["viridis"]
    for i, ridge in enumerate(ridges):
        ratios = [relative(measured["ridges"][ridge], nearest) for measured in by_tokens.values()]
        axes.plot(counts, ratios, "o-", color=shades(0.92 * i / max(1, len(ridges) - 1)), markersize=3, label=ridge)
    best = [relative([loss for _, loss in best_ridges(measured)], nearest) for measured in by_tokens.values()]
    axes.plot(counts, best, "--", color="black", linewidth=1.6, label="best for each layer")
    chosen = [relative(measured["chosen"], nearest) for measured in by_tokens.values()]
    axes.plot(counts, chosen, "s-", color=COLOURS[0], linewidth=1.8, markersize=4, label="chosen from the data")
    axes.axhline(1, color=COLOURS[1], linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_xlabel("calibration tokens")
    axes.set_ylabel("held-out loss / RTN's")
    axes.set_title("Plain GPTQ at 4 bits, by ridge", loc="left")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")


def draw_embeddings(axes: Axes, results: dict[str, Any], figure: str, label: str) -> None:
    """Plots how far a figure of the embeddings is from 1."""
    by_bits = results["embeddings"]
    for position, schemes in enumerate(by_bits.values()):
        for x, colour, (name, figures) in zip(places(len(schemes), position), COLOURS, schemes.items(), strict=True):
            label_once = name if position == 0 else None
            axes.plot([x], [1 - figures[figure]], "o", color=colour, markersize=9, label=label_once)
    log_ticks(axes)
    axes.set_xticks(range(len(by_bits)), [f"{bits} bits" for bits in by_bits])
    axes.set_ylabel(f"1 - {label}  (log scale)")
    axes.set_title(f"Sentence embeddings: 1 - {label}", loc="left")


def draw(results: dict[str, Any], path: Path, digest: str) -> None:
    """The plot."""
    with mpl.rc_context(STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
        draw_losses(grid[0, 0], results)
        draw_ridges(grid[0, 1], results)
        draw_embeddings(grid[1, 0], results, "mean_cosine", "mean cosine")
        draw_embeddings(grid[1, 1], results, "spearman", "Spearman correlation")
        # One legend for the three panels that show schemes.
        figure.legend(*grid[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
        setup = results["setup"]
        figure.suptitle(
            f"MiniLM quantized: {len(setup['layers'])} layers, group {setup['group_size']}, "
            f"{setup['tokens']:,} calibration and {setup['fresh_tokens']:,} held-out tokens; lower is better",
            x=0.01,
            ha="left",
            fontsize=13,
            fontweight="bold",
        )
        # Without date and version the same figures give the same bytes. Source identifies the figures.
        figure.savefig(path, dpi=110, metadata={"Software": None, "Source": f"quality.json sha256 {digest}"})
        plt.close(figure)


def write(source: Path, folder: Path) -> None:
    """Writes quality.md and quality.png into a folder; the handwritten text is taken from docs/quality.md."""
    content = source.read_bytes()
    results = json.loads(content)
    (folder / "quality.md").write_text(page((DOCS / "quality.md").read_text(), results))
    draw(results, folder / "quality.png", hashlib.sha256(content).hexdigest())


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and the plot; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", type=Path, nargs="?", default=SOURCE, help="default: benchmarks/results/quality.json"
    )
    parser.add_argument("--output", type=Path, default=DOCS, help="the folder to write to (default: docs)")
    options = parser.parse_args(arguments)
    write(options.results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
