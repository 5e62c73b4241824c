"""What a terminal shows: the progress of a run, and reports as tables. In a pipe the same as plain lines."""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich import box
from rich import progress as rich_progress
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from miniquant import units
from miniquant.report import (
    Kind,
    Report,
    by_kind,
    geometric_mean,
    grid_of_layer,
    judged_on,
    place_of,
    ratio,
    worst_layers,
)
from miniquant.results import LayerResult

if TYPE_CHECKING:
    from miniquant.loading import Contents, LayerContents, TensorContents

# Nobody sees where a pipe ends, and names that are cut cannot be searched for.
PIPE_WIDTH = 240
# Layers whose speed the time left is told from: more than a block has, and no less than a quarter of the model.
SPEED_LAYERS = 32
NARROW, WIDE, WIDEST = 70, 110, 136  # columns

logger = logging.getLogger(__name__)


def console_of(stream: TextIO) -> Console:
    """A console for a stream: in colour on a terminal, unless NO_COLOR is set; without a limit of width in a pipe."""
    width = None if stream.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def memory() -> int:
    """Bytes of memory that the process holds; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  (a Path would be made each time)
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class Progress:
    """Shows how far a run is: on a terminal a bar, elsewhere lines, at most one each `interval` seconds.

    Both have the layer, its loss relative to that of rounding to nearest (held-out tokens where there are any), the
    time left, how many calibration tokens come through the whole model a second, and the memory that the process holds.
    Speed is that of the last layers, so what a resumed run only reads, and loading the model, do not count. Notes on
    layers are shown when they come; everything is logged, too (:mod:`logging`, "miniquant.terminal").

    Args:
        tokens: of calibration; None shows no speed.
        console: where to; None is standard error.
        interval: between lines, in seconds.
        clock: that gives seconds.

    Example:
        >>> with Progress(tokens=calibration.tokens) as progress:
        ...     quantize_model(model, calibration, recipe, progress=progress.layer)
    """

    def __init__(
        self,
        *,
        tokens: int | None = None,
        console: Console | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokens = tokens
        self._console = console_of(sys.stderr) if console is None else console
        self._interval = interval
        self._clock = clock
        self._shown = -float("inf")
        self._ends: deque[tuple[int, float]] = deque()
        self._bar: rich_progress.Progress | None = None
        self._task: rich_progress.TaskID | None = None

    def __enter__(self) -> "Progress":  # noqa: PYI034  (Self is of Python 3.11)
        if self._console.is_terminal:
            self._bar = rich_progress.Progress(*_columns(self._console.width), console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def stage(self, what: str) -> None:
        """Says what happens now, before or after the layers."""
        logger.info("%s", what)
        if self._bar is None:
            self._console.print(Text(what))
        elif self._task is None:
            self._task = self._bar.add_task(what, total=None, figures="", left="")
        else:
            self._bar.update(self._task, description=what)

    def layer(self, layer: LayerResult, number: int, of: int) -> None:
        """A layer is done: the `number`-th of `of`."""
        now = self._clock()
        self._ends.append((number, now))
        if len(self._ends) > max(SPEED_LAYERS, of // 4) + 1:
            self._ends.popleft()
        first, then = self._ends[0]
        layers_per_second = (number - first) / (now - then) if now > then else 0
        relative = _relative(layer)
        parts = ["" if relative is None else f"loss {relative:.3f} of RTN"]
        if self._tokens is not None and layers_per_second:
            parts.append(f"{self._tokens * layers_per_second / of:,.0f} tokens/s")
        parts.append(units.size(memory()))
        figures = "  ".join(part for part in parts if part)
        left = of - number
        time_left = f"{units.duration(left / layers_per_second)} left" if left and layers_per_second else ""
        logger.info("layer %d of %d: %s: %s", number, of, layer.name, figures)
        for note in layer.notes:
            logger.info("layer %s: %s", layer.name, note)
            self._console.print(Text(f"{layer.name}: {note}", style="yellow"))
        if self._bar is not None:
            self._show_bar(layer.name, number, of, figures, time_left)
        elif now - self._shown >= self._interval or not left:
            self._shown = now
            line = "  ".join(part for part in (f"{number}/{of}", layer.name, figures, time_left) if part)
            self._console.print(Text(line), soft_wrap=True)

    def _show_bar(self, name: str, number: int, of: int, figures: str, left: str) -> None:
        assert self._bar is not None  # noqa: S101
        if self._task is None:
            self._task = self._bar.add_task(name, total=of, figures="", left="")
        self._bar.update(self._task, description=name, completed=number, total=of, figures=figures, left=left)


def _relative(layer: "LayerResult | LayerContents") -> float | None:
    """A layer's loss relative to that of rounding to nearest, on held-out tokens where there are any."""
    for loss, nearest in ((layer.held_out_loss, layer.held_out_rtn_loss), (layer.loss, layer.rtn_loss)):
        if loss is not None and nearest:
            return loss / nearest
    return None


def _columns(width: int) -> list[rich_progress.ProgressColumn]:
    """What a bar shows on a terminal of so many columns: the layer's name is cut first, then figures are left out."""
    text = rich_progress.TextColumn
    columns: list[rich_progress.ProgressColumn] = [
        rich_progress.BarColumn(bar_width=max(8, min(30, width // 5))),
        rich_progress.MofNCompleteColumn(),
    ]
    if width >= NARROW:
        columns.append(text("{task.fields[figures]}", style="cyan"))
    columns.append(text("{task.fields[left]}", style="green"))
    if width >= WIDE:
        columns.append(_NameColumn(width // 4))
    return columns


class _NameColumn(rich_progress.ProgressColumn):
    """The task's description, its end where it is too long."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def render(self, task: rich_progress.Task) -> Text:
        """The text."""
        name = task.description
        return Text(name if len(name) <= self._most else f"…{name[1 - self._most :]}", style="dim")


def report_tables(report: Report, *, every_layer: bool = False, width: int = 100) -> RenderableType:
    """A report as rich shows it: kinds of layers, or every layer, the worst ones, sums, notes.

    Args:
        report: of :mod:`miniquant.report`.
        every_layer: whether each layer has a row, instead of each kind.
        width: of the terminal: on a narrow one, columns are left out.
    """
    tokens = judged_on(report)
    parts: list[RenderableType] = [
        _layers_table(report, width) if every_layer else _kinds_table(by_kind(report), width)
    ]
    if tokens is not None and not every_layer and len(report["layers"]) > 1:
        parts += ["", _worst_table(report)]
    parts += ["", _sums(report)]
    notes = [f"{layer['name']}: {note}" for layer in report["layers"] for note in layer["notes"]]
    shown = [*report["notes"], *notes]
    parts += [Text(f"note: {note}", style="yellow") for note in shown[:10]]
    if len(shown) > 10:
        parts.append(Text(f"note: and {len(shown) - 10} more, in the report", style="yellow"))
    return Group(*parts)


def table(title: str | None, columns: Sequence[tuple[str, bool]]) -> Table:
    """A table without rows; of each column the heading, and whether it has numbers.

    Text goes on in the next line where the terminal is too narrow for it, numbers do not.
    """
    made = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for heading, is_number in columns:
        made.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    return made


def contents_tables(contents: "Contents", *, every_layer: bool = False) -> RenderableType:
    """What a folder or file holds: quantized layers by kind or one by one, and what is not quantized."""
    groups: dict[str, list[LayerContents]] = {}
    for layer in contents.layers:
        groups.setdefault(layer.name if every_layer else place_of(layer.name).kind, []).append(layer)
    heads = [("layer", False)] if every_layer else [("kind of layer", False), ("layers", True)]
    has_losses = any(_relative(layer) is not None for layer in contents.layers)
    columns = [*heads, ("type", False), ("group", True), ("N × K", True), ("bits/weight", True), ("bytes", True)]
    made = table(None, [*columns, *([("loss/RTN", True)] if has_losses else [])])
    for name, layers in groups.items():
        nbytes = sum(layer.nbytes for layer in layers)
        ratios = [value for layer in layers if (value := _relative(layer)) is not None]
        made.add_row(
            name,
            *([] if every_layer else [str(len(layers))]),
            each(f"{layer.kind}{'' if layer.symmetric in (True, None) else ' asym.'}" for layer in layers),
            each(group_text(layer.group_size) for layer in layers),
            each(" × ".join(map(str, layer.shape)) for layer in layers),
            f"{8 * nbytes / sum(layer.weights for layer in layers):.2f}",
            units.size(nbytes),
            *([units.ratio(geometric_mean(ratios) if ratios else None)] if has_losses else []),
        )
    parts: list[RenderableType] = []
    architecture = contents.architecture or "a model"
    form = "not quantized" if contents.format is None else f"format {contents.format}"
    parts.append(Text(f"{contents.path}: {architecture}, {form}", style="bold"))
    if contents.layers:
        parts += ["", made, ""]
        parts.append(
            f"{len(contents.layers)} quantized layers: {units.size(contents.layer_bytes)}, "
            f"{contents.bits_per_weight:.2f} bits per weight, scales included"
        )
    parts += ["", _others_table(contents, every_tensor=every_layer)] if contents.others else []
    parts += [Text(f"note: {note}", style="yellow") for note in contents.notes]
    return Group(*parts)


def _others_table(contents: "Contents", *, every_tensor: bool) -> Table:
    """Tensors that are not quantized."""
    groups: dict[str, list[TensorContents]] = {}
    for tensor in contents.others:
        groups.setdefault(tensor.name if every_tensor else place_of(tensor.name).kind, []).append(tensor)
    title = f"not quantized: {units.size(contents.other_bytes)}"
    heads = [("tensor", False)] if every_tensor else [("kind of tensor", False), ("tensors", True)]
    made = table(title, [*heads, ("type", False), ("shape", True), ("bytes", True)])
    for name, tensors in groups.items():
        made.add_row(
            name,
            *([] if every_tensor else [str(len(tensors))]),
            each(tensor.dtype for tensor in tensors),
            each(" × ".join(map(str, tensor.shape)) or "1" for tensor in tensors),
            units.size(sum(tensor.nbytes for tensor in tensors)),
        )
    return made


def each(texts: Iterable[str]) -> str:
    """Different texts, in order; of many the first three."""
    different = list(dict.fromkeys(texts))
    return ", ".join(different[:3]) + (", ..." if len(different) > 3 else "")


def group_text(size: int | None) -> str:
    """A group size as tables show it."""
    return "–" if size is None else "row" if size == -1 else str(size)  # noqa: RUF001


def _kinds_table(kinds: Sequence[Kind], width: int) -> Table:
    wide = width >= NARROW
    columns = [("kind of layer", False), ("layers", True), ("bits", True), ("group", True), ("loss/RTN", True)]
    made = table(None, [*columns, ("worst", True), *([("time", True), ("bytes", True)] if wide else [])])
    for kind in kinds:
        nearest = sum(layer["method"] == "rtn" for layer in kind.layers)
        made.add_row(
            kind.kind,
            f"{len(kind.layers)}" + (f" ({nearest} RTN)" if nearest else ""),
            ", ".join(kind.grids()),
            ", ".join(map(group_text, kind.values("group_size"))),
            units.ratio(kind.ratio),
            units.ratio(kind.worst),
            *([units.duration(kind.total("seconds")), units.size(kind.total("bytes_after"))] if wide else []),
        )
    return made


def _layers_table(report: Report, width: int) -> Table:
    wide = width >= WIDEST
    columns = [("layer", False), ("bits", True), ("group", True), ("by", False), ("loss/RTN", True)]
    more = [("tokens", True), ("ridge", True), ("loss", True), ("RTN's", True), ("time", True), ("bytes", True)]
    made = table(None, [*columns, *(more if wide else [])])
    tokens = judged_on(report) or "held_out"
    prefix = "held_out_" if tokens == "held_out" else ""
    for layer in report["layers"]:
        figures = [
            f"{layer['tokens']:,}",
            units.loss(layer["ridge"]),
            units.loss(layer[f"{prefix}loss"]),
            units.loss(layer[f"{prefix}rtn_loss"]),
            units.duration(layer["seconds"]),
            units.size(layer["bytes_after"]),
        ]
        made.add_row(
            layer["name"],
            grid_of_layer(layer),
            group_text(layer["group_size"]),
            "RTN" if layer["method"] == "rtn" else layer["preset"],
            units.ratio(ratio(layer, tokens)),
            *(figures if wide else []),
        )
    return made


def _worst_table(report: Report) -> Table:
    made = table("layers that gain least", [("layer", False), ("bits", True), ("loss/RTN", True)])
    for layer, value in worst_layers(report, 5):
        made.add_row(layer["name"], grid_of_layer(layer), units.ratio(value))
    return made


def _sums(report: Report) -> Text:
    """The figures of the whole, a line each."""
    totals, size, seconds = report["totals"], report["bytes"], report["seconds"]
    lines = [f"{totals['gptq']} layers by GPTQ, {totals['rtn']} rounded to nearest"]
    if totals["bits_per_weight"] is not None:
        lines[0] += f"; {totals['bits_per_weight']:.2f} bits per weight, scales included"
    tokens = judged_on(report)
    if tokens is not None:
        found = totals["loss_ratio"][tokens]
        on = "held-out" if tokens == "held_out" else "calibration"
        lines.append(f"loss on {on} tokens relative to RTN: {found['geometric_mean']:.3f} (geometric mean)")
    if size["before"] and size["after"] is not None:
        share = size["after"] / size["before"]
        lines.append(f"weights: {units.size(size['before'])} before, {units.size(size['after'])} after ({share:.2f})")
    sources = report["calibration"]["sources"]
    if sources:
        named = ", ".join(source["name"] for source in sources)
        lines.append(f"calibrated on {report['calibration']['tokens']:,} tokens of {named}")
    if "total" in seconds:
        parts = ", ".join(f"{name} {units.duration(value)}" for name, value in seconds.items() if name != "total")
        lines.append(f"time: {units.duration(seconds['total'])} ({parts})")
    if report["peak_memory"] is not None:
        lines.append(f"memory at most: {units.size(report['peak_memory'])}")
    return Text("\n".join(lines))
