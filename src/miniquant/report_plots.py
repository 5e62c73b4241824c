"""The plots of a report. They need matplotlib, which is not needed for anything else."""

import bisect
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from miniquant import units
from miniquant.bits import Allocation, Unit, uniform_cost
from miniquant.report import Report, by_kind, judged_on, place_of, ratio, worst_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # it comes with matplotlib, so plots look the same everywhere
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "figure.facecolor": "white",
    "svg.hashsalt": "miniquant",  # equal reports give equal files
}
# Readers with any colour vision can tell these apart (Okabe and Ito); kinds beyond them get other markers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b", "#8c6d1f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
RTN_COLOUR = "#9b1c31"
BEFORE_COLOUR = "#c3c9d0"
MOST_BARS = 12
MOST_POINTS = 3000  # beyond, points are drawn as pixels: each costs a hundred bytes of SVG
WORDS = {"held_out": "held-out tokens", "calibration": "calibration tokens"}


class Plot(NamedTuple):
    """A plot.

    Attributes:
        name: a short one.
        description: what it shows, for whoever does not see it, and below it.
        svg: the picture.
    """

    name: str
    description: str
    svg: bytes


def plots(report: Report) -> list[Plot]:
    """All plots that a report has figures for.

    Raises:
        ImportError: without matplotlib.
    """
    with _styled():
        drawn: list[Plot] = []
        tokens = judged_on(report)
        if tokens is not None:
            drawn.append(_losses(report, tokens))
            drawn.append(_worst(report, tokens))
        if report["layers"]:
            drawn.append(_parts(report))
    return drawn


def write_bits_plot(path: Path, layers: Sequence[Unit], allocations: Sequence[Allocation], chosen: Allocation) -> None:
    """Draws what averages of bits cost, chosen by layer and uniform.

    Args:
        path: of the picture; its ending says which kind it is.
        layers: units, with costs.
        allocations: bits chosen for several averages.
        chosen: the one that is taken.

    Raises:
        ImportError: without matplotlib.
        ValueError: for an ending that matplotlib does not know.
    """
    with _styled():
        figure = _figure(7, 4.2)
        axes = figure.subplots()
        widths = sorted(layers[0].costs)
        uniform = [uniform_cost(layers, bits) for bits in widths]
        axes.plot(widths, uniform, color=COLOURS[1], marker="s", linestyle="--", label="the same bits for every layer")
        averages, costs = [one.average for one in allocations], [one.cost for one in allocations]
        axes.plot(averages, costs, color=COLOURS[0], marker="o", markersize=4, label="chosen by layer")
        axes.plot([chosen.average], [chosen.cost], color=COLOURS[0], marker="*", markersize=14, linestyle="")
        axes.set_yscale("log")
        axes.set_xlabel("bits of a weight on average, without scales")
        axes.set_ylabel("expected KL divergence, nats per token")
        axes.set_title(f"What bits cost; the star is {chosen.average:.2f} bits")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=160)


@contextmanager
def _styled() -> Iterator[None]:
    try:
        import matplotlib as mpl  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "plots: expected the package matplotlib to be installed: pip install 'miniquant[plots]'"
        ) from error
    with mpl.rc_context(STYLE):
        yield


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # noqa: PLC0415

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=160)
    return buffer.getvalue()


def _losses(report: Report, tokens: str) -> Plot:
    """Loss ratios over the blocks of the model, a line for each kind of layer."""
    places = {layer["name"]: place_of(layer["name"]) for layer in report["layers"]}
    axis = _BlockAxis.of([place.block or place.kind for place in places.values()])
    lines: dict[str, dict[int, list[float]]] = {}
    nearest: list[tuple[int, float]] = []
    for layer in report["layers"]:
        value = ratio(layer, tokens)
        if value is None:
            continue
        place = places[layer["name"]]
        at = axis.positions[place.block or place.kind]
        lines.setdefault(place.kind, {}).setdefault(at, []).append(value)
        if layer["method"] == "rtn":
            nearest.append((at, value))
    points = sum(len(values) for line in lines.values() for values in line.values())
    middles = {kind: {at: statistics.median(values) for at, values in line.items()} for kind, line in lines.items()}
    order = sorted(middles, key=lambda kind: -statistics.fmean(middles[kind].values()))
    figure = _figure(10, max(4.2, 0.19 * len(order)))
    axes = figure.subplots()
    axes.axhline(1, color=RTN_COLOUR, linewidth=1.2, linestyle=(0, (5, 2)))
    axes.annotate(
        "rounding to nearest", (1, 1), xycoords=("axes fraction", "data"), xytext=(-3, 3), textcoords="offset points",
        ha="right", va="bottom", color=RTN_COLOUR, fontsize=8,
    )  # fmt: skip
    for number, kind in enumerate(order):
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
        if any(len(values) > 1 for values in lines[kind].values()):
            spread = [(at, value) for at, values in lines[kind].items() for value in values]
            _scatter(axes, spread, s=7, color=colour, alpha=0.45, linewidths=0, rasterized=points > MOST_POINTS)
        style = ("-", "--", ":")[number // len(COLOURS) % 3]
        label = _shortened(f"{kind}  {statistics.fmean(middles[kind].values()):.2f}", 46)
        for run in axis.runs(sorted(middles[kind])):
            middle = [middles[kind][position] for position in run]
            axes.plot(
                run, middle, color=colour, marker=marker, markersize=3.5, linewidth=1.3, linestyle=style, label=label
            )
            label = ""  # one entry in the legend
    if nearest:
        style_of_nearest = {"facecolors": "none", "edgecolors": RTN_COLOUR, "linewidths": 1.3, "zorder": 5}
        _scatter(axes, nearest, s=42, label="rounded to nearest", **style_of_nearest)
    highest = max(max(values) for line in lines.values() for values in line.values())
    axes.set_ylim(0, max(1.1, 1.06 * highest))
    axes.set_ylabel("loss / loss of RTN")
    axes.set_title(f"Loss relative to rounding to nearest (RTN), on {WORDS[tokens]}")
    axis.label(axes)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, title="kind, mean", alignment="left")
    experts = any(len(values) > 1 for line in lines.values() for values in line.values())
    return Plot(
        "losses",
        f"The loss of {points} layers on {WORDS[tokens]}, divided by that of rounding to nearest, by block and kind of "
        "layer. Lower is better; below the dashed line GPTQ gains."
        + (" Where a block has several layers of a kind, as experts, the line is their median." if experts else "")
        + (" Circles are layers that are rounded to nearest." if nearest else ""),
        _svg(figure),
    )


def _scatter(axes: "Axes", points: Sequence[tuple[int, float]], **style: Any) -> None:
    axes.scatter([x for x, _ in points], [y for _, y in points], **style)


@dataclass(frozen=True)
class _BlockAxis:
    """The blocks of a model along the x axis.

    Attributes:
        positions: of each block's name.
        stacks: a name for each run of blocks that are numbered in one list, and where it begins.
    """

    positions: Mapping[str, int]
    stacks: Sequence[tuple[str, int]]

    @classmethod
    def of(cls, blocks: Sequence[str]) -> "_BlockAxis":
        """Blocks in order of first appearance, those of one list side by side."""
        names = dict.fromkeys(blocks)
        by_stack: dict[str, list[str]] = {}
        for name in names:
            stack, _, number = name.rpartition(".")
            by_stack.setdefault(stack if number.isdecimal() else name, []).append(name)
        positions: dict[str, int] = {}
        stacks = []
        for stack, members in by_stack.items():
            stacks.append((stack, len(positions)))
            numbered = [name for name in members if name.rpartition(".")[2].isdecimal()]
            for name in sorted(numbered, key=lambda name: int(name.rpartition(".")[2])) or members:
                positions[name] = len(positions)
        return cls(positions, stacks)

    def runs(self, positions: Sequence[int]) -> list[list[int]]:
        """Ascending positions, those of each list of blocks apart."""
        starts = [start for _, start in self.stacks]
        runs: dict[int, list[int]] = {}
        for position in positions:
            runs.setdefault(bisect.bisect(starts, position), []).append(position)
        return list(runs.values())

    def label(self, axes: "Axes") -> None:
        """Ticks with the blocks' numbers, and lines between the lists."""
        step = max(1, math.ceil(len(self.positions) / 32))
        ends = [start for _, start in self.stacks[1:]] + [len(self.positions)]
        ticks: dict[int, str] = {}
        for (stack, start), end in zip(self.stacks, ends, strict=True):
            if start:
                axes.axvline(start - 0.5, color="#8a9099", linewidth=0.9)
            alone = stack in self.positions
            ticks |= {position: "" if alone else str(position - start) for position in range(start, end, step)}
            if len(self.stacks) > 1 and len(self.stacks) <= 6:
                axes.annotate(
                    _shortened(stack, 28), ((start + end - 1) / 2, 0), xycoords=("data", "axes fraction"),
                    xytext=(0, -18), textcoords="offset points", ha="center", va="top", fontsize=8,
                )  # fmt: skip
        for name, position in self.positions.items():  # numbers of a list may begin anywhere, and have gaps
            if ticks.get(position):
                ticks[position] = name.rpartition(".")[2]
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_xlim(-0.6, max(len(self.positions) - 0.4, 0.6))
        axes.grid(visible=False, axis="x")
        several = len(self.stacks) > 1
        axes.set_xlabel("block" if several else f"block of {self.stacks[0][0]}", labelpad=14 if several else None)


def _worst(report: Report, tokens: str) -> Plot:
    """The layers of the highest loss ratios."""
    worst = worst_layers(report, MOST_BARS)[::-1]
    figure = _figure(10, 1.1 + 0.27 * len(worst))
    axes = figure.subplots()
    names = [_shortened(layer["name"], 60) for layer, _ in worst]
    colours = [RTN_COLOUR if layer["method"] == "rtn" else COLOURS[0] for layer, _ in worst]
    axes.barh(range(len(worst)), [value for _, value in worst], color=colours, height=0.68)
    highest = max(1.0, *(value for _, value in worst))
    for row, (layer, value) in enumerate(worst):
        inside = value > 0.4 * highest  # there is room in the bar
        style: dict[str, Any] = {
            "va": "center",
            "fontsize": 8,
            "color": "white" if inside else "black",
            "textcoords": "offset points",
        }
        axes.annotate(_grid(layer), (0 if inside else value, row), xytext=(6 if inside else 42, 0), **style)
        axes.annotate(
            f"{value:.3f}", (value, row), xytext=(-6 if inside else 4, 0), ha="right" if inside else "left", **style
        )
    axes.set_yticks(range(len(worst)), names, fontsize=8)
    axes.axvline(1, color=RTN_COLOUR, linewidth=1.2, linestyle=(0, (5, 2)))
    axes.set_xlim(0, 1.08 * highest)
    axes.set_xlabel("loss / loss of RTN")
    axes.grid(visible=False, axis="y")
    axes.set_title(f"The {len(worst)} layers that gain least" if len(worst) > 1 else "The layer that gains least")
    return Plot(
        "worst",
        f"The layers whose loss on {WORDS[tokens]} is highest relative to that of rounding to nearest, with bits and "
        "group size. Give such layers more bits if they matter.",
        _svg(figure),
    )


def _grid(layer: Mapping[str, Any]) -> str:
    nearest = "" if layer["method"] == "gptq" else ", RTN"
    if layer.get("superblocks") is not None:
        return f"{layer['superblocks']}{nearest}"
    group = "a group per row" if layer["group_size"] == -1 else f"groups of {layer['group_size']}"
    return f"{layer['bits']} bits, {group}{nearest}"


def _parts(report: Report) -> Plot:
    """Time and bytes by part."""
    seconds = {part: value for part, value in report["seconds"].items() if part != "total"}
    seconds = dict(sorted(seconds.items(), key=lambda pair: pair[1]))
    sizes = _sizes(report)
    figure = _figure(10, 1.4 + 0.34 * max(len(seconds), len(sizes)))
    time_axes, size_axes = figure.subplots(1, 2, width_ratios=(1, 1.25))
    total = sum(seconds.values())
    bars = time_axes.barh(list(seconds), list(seconds.values()), color=COLOURS[0], height=0.62)
    shares = [f"{units.duration(value)}, {value / total:.0%}" if total else "0 s" for value in seconds.values()]
    time_axes.bar_label(bars, shares, padding=4, fontsize=8)
    time_axes.set_xlim(0, 1.45 * max(seconds.values(), default=1) or 1)
    time_axes.set_title(f"Time: {units.duration(report['seconds'].get('total', total))}")
    time_axes.set_xlabel("seconds")
    time_axes.grid(visible=False, axis="y")

    rows = range(len(sizes))
    names, before, after = [list(column) for column in zip(*sizes[::-1], strict=True)]
    size_axes.barh([row + 0.19 for row in rows], before, color=BEFORE_COLOUR, height=0.36, label="before")
    bars = size_axes.barh([row - 0.19 for row in rows], after, color=COLOURS[2], height=0.36, label="after")
    texts = [f"{units.size(old)} → {units.size(new)}" for old, new in zip(before, after, strict=True)]
    for row, (text, old, new) in enumerate(zip(texts, before, after, strict=True)):
        size_axes.annotate(
            text, (max(old, new), row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    size_axes.set_yticks(rows, [_shortened(name, 40) for name in names])
    size_axes.set_xlim(0, 1.5 * max(*before, *after, 1))
    size_axes.xaxis.set_major_formatter(lambda value, _: units.size(value) if value else "0")
    size_axes.xaxis.set_major_locator(_few_ticks())
    size_axes.grid(visible=False, axis="y")
    size_axes.set_title(f"Bytes: {units.size(sum(before))} → {units.size(sum(after))}")
    size_axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False, borderaxespad=0.2)
    return Plot(
        "parts",
        "Left: the seconds of each part of the run. Right: bytes of weights before and after, by kind of layer.",
        _svg(figure),
    )


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    return MaxNLocator(4)


def _sizes(report: Report) -> list[tuple[str, int, int]]:
    """Kinds of layers with their bytes before and after, the largest first; what is not quantized last."""
    sizes = [(kind.kind, int(kind.total("bytes_before")), int(kind.total("bytes_after"))) for kind in by_kind(report)]
    sizes.sort(key=lambda row: -row[1])
    if len(sizes) > MOST_BARS:
        rest = sizes[MOST_BARS - 1 :]
        merged = (f"{len(rest)} other kinds", sum(row[1] for row in rest), sum(row[2] for row in rest))
        sizes = [*sizes[: MOST_BARS - 1], merged]
    totals, whole = report["totals"], report["bytes"]
    if whole["before"] is not None and whole["after"] is not None:
        left = max(0, whole["before"] - totals["bytes_before"]), max(0, whole["after"] - totals["bytes_after"])
        sizes.append(("all else", *left))
    return sizes


def _shortened(text: str, most: int) -> str:
    """A text whose middle is left out where it is long: both ends of a layer's name say something."""
    if len(text) <= most:
        return text
    front = (most - 1) // 2
    return f"{text[:front]}…{text[len(text) - (most - 1 - front) :]}"
