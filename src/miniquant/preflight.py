"""What a run would do, before hours are spent: layers, sizes, and the time and memory that it takes on this machine.

How time is estimated
    The run itself is begun, with all of its tokens, in a folder beside the output that is removed afterwards, and ended
    after the first two blocks. A layer's time is that between its end and the end of the layer before: forward pass,
    Hessians, solver, judging, the weights that are read and the file that is written. The second block stands for all
    that come after it, so each layer takes the time of the last measured layer of its kind, size and options. Layers of
    a kind that was not measured take the mean time of an operation times the number of theirs. Then the finished layers
    are written in the output's format, and the rate of that stands for all bytes. Nothing is computed after the last
    layer: a walk lets no batch go on that has come to all of them.

How memory is estimated
    A block is in memory at a time, so the most that the process held until it was ended is the most that it will hold.
    Blocks that are larger than the first two take the difference in bytes more; where the whole model stays in memory,
    all other blocks come to it.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from miniquant import units
from miniquant.checkpoint import CheckpointWriter
from miniquant.formats import Gguf, LayerGrid, Native, format_named
from miniquant.layer_file import dtype_names
from miniquant.modules import LeftAlone
from miniquant.output import planned_grid
from miniquant.recipe import LayerOptions
from miniquant.report import as_dict, place_of
from miniquant.report_page import write_report
from miniquant.results import LayerResult, ModelResult, Stopped
from miniquant.run import FolderPlan, peak_memory, plan_folder
from miniquant.terminal import NARROW, each, group_text, table

logger = logging.getLogger(__name__)

MEASURED_BLOCKS = 2
# Of bytes of weights that are copied to tell how fast the disk takes them.
_COPIED = 1 << 26


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that would be quantized.

    Attributes:
        name: in the model.
        grid: of its weight.
        options: what the recipe says of it.
        bytes_before: of its weight.
        tokens: that would be multiplied with it.
    """

    name: str
    grid: LayerGrid
    options: LayerOptions
    bytes_before: int
    tokens: int

    @property
    def operations(self) -> float:
        """About how many multiplications it takes: forward pass, Hessian, factorization and sweep."""
        n, k = self.grid.rows, self.grid.columns
        return self.tokens * k * (n + k / 2) + k * k * (n + k / 3)

    @property
    def alike(self) -> tuple[Any, ...]:
        """Equal for layers that take the same time."""
        return place_of(self.name).kind, self.grid.rows, self.grid.columns, self.options


@dataclass(frozen=True)
class Measured:
    """What the beginning of a run took.

    Attributes:
        layers: seconds of each, in the order in which they came; those of the first from the beginning of the run.
        writing: seconds for a byte of the output.
        report: seconds of the report.
        peak: bytes of memory that the process held at most.
    """

    layers: Mapping[str, float]
    writing: float
    report: float
    peak: int


@dataclass(frozen=True)
class Preflight:
    """What a run would do.

    Attributes:
        model: folder of the model.
        output: folder that would be written.
        format: of it.
        dtype: in which the model would run.
        layers: that would be quantized.
        left_alone: weights that would not be, with the reason.
        warnings: what readers of the format will not do, and what calibration says.
        tokens: of calibration.
        held_out_tokens: that layers would be judged on.
        bytes_before: of the source's weights.
        bytes_after: of the output's.
        seconds: of the whole run; None where it was not measured.
        memory: bytes that the process would hold at most; None where it was not measured.
        measuring: seconds that the measurement took.
        parts: of `seconds`: "layers", "writing", "report".
    """

    model: Path
    output: Path
    format: str
    dtype: str
    layers: Sequence[PlannedLayer]
    left_alone: Sequence[LeftAlone]
    warnings: Sequence[str]
    tokens: int
    held_out_tokens: int
    bytes_before: int
    bytes_after: int
    seconds: float | None = None
    memory: int | None = None
    measuring: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)


def preflight(model_dir: Path, output_dir: Path, *, measure: bool = True, **options: Any) -> Preflight:
    """What :func:`miniquant.quantize_folder` would do; everything it checks before work starts is checked.

    Nothing is left on the disk.

    Args:
        model_dir: as there.
        output_dir: as there.
        measure: whether the first two blocks are quantized, to tell time and memory.
        options: all other arguments of :func:`miniquant.quantize_folder`.

    Raises:
        ValueError, TypeError, OSError, ImportError: as there.
        miniquant.QuantizationError, miniquant.walk.WalkError: where the measured part fails, as the run would.
    """
    start = time.perf_counter()
    plan = plan_folder(model_dir, output_dir, **options)
    layers = _planned_layers(plan)
    found: dict[str, Any] = {
        "model": plan.source.checkpoint.folder,
        "output": plan.output,
        "format": plan.form.name,
        "dtype": dtype_names(plan.dtype),
        "layers": layers,
        "left_alone": plan.planned.plan.left_alone,
        "warnings": tuple(dict.fromkeys((*plan.notes, *plan.calibration.notes))),
        "tokens": plan.calibration.tokens,
        "held_out_tokens": plan.calibration.held_out_tokens,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
    }
    if not measure:
        return Preflight(**found)
    measured = _measured(plan, layers, start)
    parts = estimated_seconds(layers, measured, plan.bytes_after)
    names = [layer.name for layer in layers]
    memory = measured.peak + more_bytes(
        plan.source.unit_bytes(), names, measured.layers, lazy=options.get("lazy", True)
    )
    whole = time.perf_counter() - start
    return Preflight(**found, seconds=sum(parts.values()), memory=memory, measuring=whole, parts=parts)


def _planned_layers(plan: FolderPlan) -> list[PlannedLayer]:
    tokens = plan.calibration.tokens + plan.calibration.held_out_tokens
    layers = []
    for site, own in plan.planned.plan.layers:
        grid = planned_grid(site.rows, site.columns, own, plan.planned.scale_dtype)
        layers.append(PlannedLayer(site.name, grid, own, site.rows * site.columns * site.dtype.itemsize, tokens))
    return layers


def estimated_seconds(layers: Sequence[PlannedLayer], measured: Measured, bytes_after: int) -> dict[str, float]:
    """The seconds of a run by part: "layers", "writing", "report"."""
    by_kind = {}
    for layer in layers:
        if layer.name in measured.layers:
            by_kind[layer.alike] = measured.layers[layer.name]  # the last one: the first also begins the run
    seen = [layer for layer in layers if layer.name in measured.layers]
    # The first layer has to wait for what is read and computed before it, which no other has to.
    steady = seen[1:] or seen
    rate = sum(measured.layers[layer.name] for layer in steady) / sum(layer.operations for layer in steady)
    seconds = 0.0
    for layer in layers:
        known = measured.layers.get(layer.name)
        seconds += by_kind.get(layer.alike, rate * layer.operations) if known is None else known
    return {
        "layers": seconds,
        "writing": measured.writing * bytes_after,
        "report": measured.report,
    }


def more_bytes(parts: Mapping[str, int], layers: Iterable[str], done: Iterable[str], *, lazy: bool) -> int:
    """Bytes of weights that a run will hold beyond those that the measured part of it held.

    Args:
        parts: bytes of blocks and modules that are read at once, by name.
        layers: names of all layers.
        done: names of the measured ones.
        lazy: whether one part is in memory at a time, or all stay there.
    """

    def sizes(names: Iterable[str]) -> list[int]:
        parents = {name[:end] for name in names for end in (*_dots(name), len(name))}
        return [nbytes for part, nbytes in parts.items() if part in parents]

    every, measured = sizes(layers), sizes(done)
    return max(every, default=0) - max(measured, default=0) if lazy else sum(every) - sum(measured)


def _dots(name: str) -> list[int]:
    return [place for place, character in enumerate(name) if character == "."]


# The measurement


def _measured(plan: FolderPlan, layers: Sequence[PlannedLayer], start: float) -> Measured:
    """Begins the run, and ends it after the first blocks.

    Args:
        plan: of which nothing is done yet.
        layers: of it.
        start: when it began to be made.
    """
    wanted = _first_blocks([layer.name for layer in layers])
    logger.info("measures %d of %d layers", len(wanted), len(layers))
    ends: dict[str, float] = {}

    def note(layer: LayerResult, _number: int, _of: int) -> None:
        ends[layer.name] = time.perf_counter()

    place = next(parent for parent in plan.output.resolve().parents if parent.is_dir())
    folder = Path(tempfile.mkdtemp(prefix=".miniquant-preflight-", dir=place))
    trial = replace(plan, output=folder / "run", resumed=False, overwrite=False)
    try:
        result = _begun(trial, note, lambda: wanted <= ends.keys())
        writing = _seconds_of_a_byte(trial, folder / "sample")
        report = _seconds_of_a_report(result, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = dict(zip(ends, (end - before for before, end in pairwise((start, *ends.values()))), strict=True))
    return Measured(seconds, writing, report, peak_memory())


def _begun(plan: FolderPlan, progress: Any, stop: Callable[[], bool]) -> ModelResult:
    """What a run did until it was stopped."""
    try:
        return plan.run(progress, stop).result
    except Stopped as stopped:
        return stopped.result


def _seconds_of_a_report(result: ModelResult, folder: Path) -> float:
    start = time.perf_counter()
    write_report(folder, as_dict(result))
    return time.perf_counter() - start


def _first_blocks(names: Sequence[str]) -> set[str]:
    """The layers of the first blocks; where there are no more blocks, the first quarter of layers, and at least one."""
    blocks = list(dict.fromkeys(place.block for name in names if (place := place_of(name)).block))
    if len(blocks) > MEASURED_BLOCKS:
        return {name for name in names if place_of(name).block in blocks[:MEASURED_BLOCKS]}
    return set(names[: max(1, len(names) // 4)])


def _seconds_of_a_byte(plan: FolderPlan, folder: Path) -> float:
    """Of the output: from layers that are done, packed and written, and some of the other tensors."""
    form = Native() if isinstance(plan.form, Gguf) else format_named(plan.form.name)
    start, nbytes = time.perf_counter(), 0
    with plan.state() as state, CheckpointWriter(folder) as writer:
        for name, layer in plan.planned.layers.items():
            if layer.site in state:
                for tensor, values in form.tensors(name, layer.of(state.quantized(layer.site))).items():
                    writer.add(tensor, values)
        for name, stored in plan.source.checkpoint.tensors.items():
            if name not in plan.planned.contents.dropped and nbytes + stored.nbytes <= _COPIED:
                writer.add(name, plan.source.checkpoint.read(name))
                nbytes += stored.nbytes
        writer.write_json("config.json", {})
    return (time.perf_counter() - start) / max(writer.tensor_bytes, 1)


# What a person sees


def preflight_tables(plan: Preflight, *, width: int = 100) -> RenderableType:
    """A preflight as rich shows it."""
    groups: dict[str, list[PlannedLayer]] = {}
    for layer in plan.layers:
        groups.setdefault(place_of(layer.name).kind, []).append(layer)
    wide = width >= NARROW
    columns = [("kind of layer", False), ("layers", True), ("N × K", True), ("bits", True), ("group", True)]
    made = table("would be quantized", [*columns, *([("preset", False), ("before", True)] if wide else [])])
    for kind, layers in groups.items():
        made.add_row(
            kind,
            str(len(layers)),
            each(f"{layer.grid.rows} × {layer.grid.columns}" for layer in layers),
            each(layer.grid.text for layer in layers),
            each(group_text(layer.grid.group_size) for layer in layers),
            *([each(layer.options.preset for layer in layers)] if wide else []),
            *([units.size(sum(layer.bytes_before for layer in layers))] if wide else []),
        )
    reasons: dict[str, list[str]] = {}
    for one in plan.left_alone:
        reasons.setdefault(_without_names(one), []).append(one.name)
    skipped = table("would be left as it is", [("parameter", False), ("why", False)])
    for reason, names in reasons.items():
        skipped.add_row(names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), reason)
    parts: list[RenderableType] = [made, ""]
    parts += [skipped, ""] if plan.left_alone else []
    parts.append(_sums(plan))
    parts += [Text(f"note: {warning}", style="yellow") for warning in plan.warnings]
    return Group(*parts)


def _without_names(one: LeftAlone) -> str:
    """The reason, the same for parameters of different blocks."""
    layer = one.name.rpartition(".")[0]
    return one.reason.replace(layer, "it") if layer and layer in one.reason else one.reason


def _sums(plan: Preflight) -> Text:
    """The figures of the whole, a line each."""
    share = plan.bytes_after / plan.bytes_before if plan.bytes_before else 0
    sizes = f"{units.size(plan.bytes_before)} before, about {units.size(plan.bytes_after)} after ({share:.2f})"
    lines = [
        f"{plan.model} to {plan.output}, format {plan.format}",
        f"weights: {sizes}",
        f"tokens: {plan.tokens:,} for calibration, {plan.held_out_tokens:,} to judge by; in {plan.dtype}",
    ]
    if plan.seconds is not None and plan.memory is not None:
        lines.append(f"time: about {units.duration(plan.seconds)}")
        lines.append(f"memory: about {units.size(plan.memory)} at most")
        lines.append(f"(measured in {units.duration(plan.measuring)}; nothing was written)")
    return Text("\n".join(lines))
