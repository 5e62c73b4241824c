"""What a run did, as a file: ``report.json``, checked against ``report.schema.json`` beside this module.

A report is a dict, so that it is the same whether it comes from a run or from a file. Losses are those of
:class:`miniquant.LayerResult`; a loss ratio is a layer's loss divided by that of rounding to nearest (RTN) on the same
tokens, so 1 is as good as RTN and 0.5 half its loss. ``report.html``, written beside it, shows the same to a person
(:mod:`miniquant.report_page`); :mod:`miniquant.terminal` shows it on a terminal.
"""

import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from miniquant.calibration import Calibration
from miniquant.formats.base import LayerGrid, grid_text
from miniquant.formats.gguf_superblocks import NBYTES
from miniquant.layer_file import dtype_names
from miniquant.recipe import Recipe
from miniquant.results import LayerResult, ModelResult
from miniquant.superblocks import SUPERBLOCK

VERSION = 1
SCHEMA = Path(__file__).with_name("report.schema.json")
JSON_NAME = "report.json"
HTML_NAME = "report.html"

Report = dict[str, Any]
Setting = str | int | float | bool | None


def as_dict(
    result: ModelResult,
    *,
    model: str | None = None,
    format: str | None = None,  # noqa: A002  (the word that users know)
    recipe: Recipe | None = None,
    calibration: Calibration | None = None,
    settings: Mapping[str, Setting] | None = None,
    bytes_before: int | None = None,
    bytes_after: int | None = None,
    peak_memory: int | None = None,
    notes: Iterable[str] = (),
) -> Report:
    """The report of a run.

    Args:
        result: of :func:`miniquant.quantize_model` or :func:`miniquant.quantize_folder`.
        model: what the quantized model is called.
        format: of the checkpoint.
        recipe: that was asked for.
        calibration: that was used.
        settings: whatever else decides the result or the time: device, dtype, threads, ...
        bytes_before: of the source's weights.
        bytes_after: of what was written for them.
        peak_memory: of the process, in bytes.
        notes: on the run, beside the result's own.
    """
    layers = [_layer(layer) for layer in result.layers.values()]
    report = {
        "schema_version": VERSION,
        "miniquant": str(torch.ops.miniquant.version()),
        "model": model,
        "format": format,
        "bytes": {"before": bytes_before, "after": bytes_after},
        "peak_memory": peak_memory,
        "settings": dict(settings or {}),
        "recipe": None if recipe is None else recipe.to_dict(),
        "calibration": _calibration(result, calibration),
        "seconds": dict(result.seconds),
        "totals": _totals(layers),
        "notes": list(dict.fromkeys((*result.notes, *notes))),
        "layers": layers,
        "left_alone": [{"name": one.name, "shape": list(one.shape), "reason": one.reason} for one in result.left_alone],
    }
    check_report("as_dict", report)
    return report


def read_report(path: str | os.PathLike[str]) -> Report:
    """Reads a report.

    Args:
        path: of report.json, or of the folder that has it.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is no report; the message names the file, the place and what was expected.
    """
    path = Path(path)
    file = path / JSON_NAME if path.is_dir() else path
    where = f"read_report: {file}"
    try:
        report = json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{where}: expected a report, but got JSON that is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where}: expected JSON, but got: {error}") from error
    check_report(where, report)
    checked: Report = report
    return checked


class Place(NamedTuple):
    """Where a layer stands in its model.

    Attributes:
        block: the part of its name that says in which block, "model.layers.0"; "" for a layer outside.
        kind: what is left of the name, without further numbers: the same for this layer of every block.
    """

    block: str
    kind: str


def place_of(name: str) -> Place:
    """Where a layer stands, by its name: ``model.layers.0.mlp.experts.7.up_proj`` is ``mlp.experts.*.up_proj``."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if first is None or first == len(parts) - 1:
        return Place("", re.sub(r"\.\d+(?=\.|$)", ".*", name))
    kind = ".".join("*" if part.isdecimal() else part for part in parts[first + 1 :])
    return Place(".".join(parts[: first + 1]), kind)


def ratio(layer: Mapping[str, Any], tokens: str = "held_out") -> float | None:
    """The loss ratio of a report's layer; None where it is not known.

    Args:
        layer: of a report.
        tokens: "held_out" or "calibration".
    """
    prefix = "held_out_" if tokens == "held_out" else ""
    loss, nearest = layer[f"{prefix}loss"], layer[f"{prefix}rtn_loss"]
    if loss is None or nearest is None:
        return None
    if nearest == 0:  # every weight is on the grid
        return 1.0 if loss == 0 else None
    return float(loss / nearest)


class Kind(NamedTuple):
    """The layers of a report that stand at one place of several blocks.

    Attributes:
        kind: as of :class:`Place`.
        layers: of the report.
        ratio: the geometric mean of their loss ratios; None where none is known.
        worst: the highest.
    """

    kind: str
    layers: tuple[Mapping[str, Any], ...]
    ratio: float | None
    worst: float | None

    def total(self, key: str) -> float:
        """The sum over the layers of one of their numbers."""
        return float(sum(layer[key] for layer in self.layers))

    def grids(self) -> list[str]:
        """What people call the different grids of the layers."""
        return sorted({grid_of_layer(layer) for layer in self.layers})

    def values(self, key: str) -> list[Any]:
        """The different values of the layers, ascending."""
        return sorted({layer[key] for layer in self.layers})


def by_kind(report: Report) -> list[Kind]:
    """The layers of a report by kind, in order of first appearance."""
    tokens = judged_on(report) or "held_out"
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for layer in report["layers"]:
        groups.setdefault(place_of(layer["name"]).kind, []).append(layer)
    kinds = []
    for kind, layers in groups.items():
        found = _ratios(layers, tokens)
        mean, worst = (None, None) if found is None else (found["geometric_mean"], found["worst"])
        kinds.append(Kind(kind, tuple(layers), mean, worst))
    return kinds


def worst_layers(report: Report, count: int) -> list[tuple[Mapping[str, Any], float]]:
    """The layers of the highest loss ratios, with these, descending."""
    tokens = judged_on(report) or "held_out"
    found = [(layer, value) for layer in report["layers"] if (value := ratio(layer, tokens)) is not None]
    return sorted(found, key=lambda pair: -pair[1])[:count]


def judged_on(report: Report) -> str | None:
    """On which tokens the layers of a report can be judged: "held_out", else "calibration"; None where on neither."""
    for tokens in ("held_out", "calibration"):
        if report["totals"]["loss_ratio"][tokens] is not None:
            return tokens
    return None


def _layer(layer: LayerResult) -> dict[str, Any]:
    """What a report has of a layer."""
    grid = LayerGrid.of(layer.quantized)
    losses = {
        f"{part}{name}loss": getattr(layer, f"{part}{name}loss") for part in ("", "held_out_") for name in ("", "rtn_")
    }
    infinite = [name for name, loss in losses.items() if loss is not None and not math.isfinite(loss)]
    return {
        "name": layer.name,
        "shape": [grid.rows, grid.columns],
        "bits": grid.bits,
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
        "full_range": grid.full_range,
        "superblocks": grid.superblocks,
        "preset": layer.options.preset,
        "method": layer.method,
        "tokens": layer.tokens,
        "held_out_tokens": layer.held_out_tokens,
        "ridge": layer.ridge,
        **{name: None if name in infinite else loss for name, loss in losses.items()},
        "seconds": layer.seconds,
        "dtype": dtype_names(layer.site.dtype),
        "bytes_before": grid.rows * grid.columns * layer.site.dtype.itemsize,
        "bytes_after": stored_bytes(grid),
        "notes": [*layer.notes, *(f"{name} is not finite" for name in infinite)],
    }


def grid_of_layer(layer: Mapping[str, Any]) -> str:
    """What people call the grid of a report's layer."""
    return grid_text(layer["bits"], layer.get("superblocks"), symmetric=layer["symmetric"])


def stored_bytes(grid: LayerGrid) -> int:
    """Bytes of a layer's codes without gaps, of its scales, and of zero points of as many bits as codes."""
    if grid.superblocks is not None:
        return grid.rows * grid.columns // SUPERBLOCK * NBYTES[grid.superblocks]
    points = 0 if grid.symmetric else -(-grid.rows * grid.groups * grid.bits // 8)
    return grid.rows * (-(-grid.columns * grid.bits // 8) + grid.groups * grid.scale_dtype.itemsize) + points


def _calibration(result: ModelResult, calibration: Calibration | None) -> dict[str, Any]:
    """Where the tokens came from, as far as that is known."""
    batches = {"batches": result.batches, "held_out_batches": result.held_out_batches}
    if calibration is None:
        return {**batches, "tokens": None, "held_out_tokens": None, "ships_with_package": None, "sources": []}
    return {
        **batches,
        "tokens": calibration.tokens,
        "held_out_tokens": calibration.held_out_tokens,
        "ships_with_package": calibration.ships_with_package,
        "sources": [
            {"name": source.name, "windows": source.windows, "tokens": source.tokens, "held_out": source.held_out}
            for source in calibration.sources
        ],
    }


def _totals(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all quantized layers together."""
    methods = Counter(layer["method"] for layer in layers)
    weights = sum(math.prod(layer["shape"]) for layer in layers)
    after = sum(layer["bytes_after"] for layer in layers)
    return {
        "layers": len(layers),
        "gptq": methods["gptq"],
        "rtn": methods["rtn"],
        "weights": weights,
        "bits_per_weight": 8 * after / weights if weights else None,
        "bytes_before": sum(layer["bytes_before"] for layer in layers),
        "bytes_after": after,
        "loss_ratio": {tokens: _ratios(layers, tokens) for tokens in ("held_out", "calibration")},
    }


def _ratios(layers: Sequence[Mapping[str, Any]], tokens: str) -> dict[str, Any] | None:
    """The loss ratios of layers in four figures; None where no layer has one."""
    found = {layer["name"]: value for layer in layers if (value := ratio(layer, tokens)) is not None}
    if not found:
        return None
    worst = max(found, key=found.__getitem__)
    values = list(found.values())
    return {
        "layers": len(found),
        "geometric_mean": geometric_mean(values),
        "median": statistics.median(values),
        "worst": found[worst],
        "worst_layer": worst,
    }


def geometric_mean(values: Sequence[float]) -> float:
    """Of numbers of at least 0; 0 where one is."""
    return math.exp(statistics.fmean(math.log(value) if value else -math.inf for value in values))


def check_report(where: str, report: object) -> None:
    """Raises a ValueError where a report does not follow the schema."""
    from jsonschema import Draft202012Validator  # noqa: PLC0415  (not for whoever writes no report)
    from jsonschema.exceptions import best_match  # noqa: PLC0415

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    error = best_match(Draft202012Validator(schema).iter_errors(report))
    if error is not None:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        raise ValueError(
            f"{where}: expected a report, but at {place.lstrip('.') or 'its root'}: {_shortened(error.message)}"
        )


def _shortened(message: str) -> str:
    return message if len(message) <= 200 else f"{message[:120]} ... {message[-60:]}"
