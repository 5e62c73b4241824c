"""A report as one HTML file that needs no other: figures, plots, tables."""

import base64
import html
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from miniquant import units
from miniquant.layer_file import replacing
from miniquant.report import HTML_NAME, JSON_NAME, Kind, Report, by_kind, check_report, grid_of_layer, judged_on, ratio
from miniquant.report_plots import plots

_STYLE = """
:root { color-scheme: light; --ink: #1c2329; --soft: #5b6670; --line: #dfe3e8; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.55rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
.sub { color: var(--soft); margin: .2rem 0 1.4rem; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; }
.card { flex: 1 1 11rem; border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
.notes { border-left: 4px solid #e69f00; background: #fdf7ea; padding: .6rem 1rem; margin: 1.4rem 0 0; }
.notes ul { margin: .2rem 0; padding-left: 1.1rem; }
figure { margin: 1.4rem 0 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; }
.scroll { overflow: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: #f5f7f9; font-weight: 600; }
.sortable th { cursor: pointer; }
.sortable th[aria-sort=ascending]::after { content: " ▲"; }
.sortable th[aria-sort=descending]::after { content: " ▼"; }
th.text, td.text { text-align: left; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; }
tr.rtn td { background: #fdf1f1; }
pre { background: #f5f7f9; border-radius: .5rem; padding: .8rem 1rem; overflow: auto; font-size: .85rem; }
footer { color: var(--soft); font-size: .85rem; margin-top: 3rem; }
@media print { .scroll { max-height: none; overflow: visible; } }
"""
# A click on a heading sorts by that column, first descending where it has numbers.
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const isText = head.classList.contains("text");
    const down = head.ariaSort === "descending" || (isText && head.ariaSort !== "ascending") ? 1 : -1;
    heads.forEach(other => { other.ariaSort = null; });
    head.ariaSort = down === 1 ? "ascending" : "descending";
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => down * (isText ? value(a).localeCompare(value(b), "en", {numeric: true})
      : (parseFloat(value(a)) || 0) - (parseFloat(value(b)) || 0)));
    table.tBodies[0].append(...rows);
  }));
}
"""


class _Column(NamedTuple):
    """Of a table: its heading, and whether it has text."""

    heading: str
    kind: str = ""  # "text", "text long", or numbers


class _Cell(NamedTuple):
    """What a cell shows, and the number that it is sorted by."""

    text: str
    value: float | None = None


def write_report(folder: str | os.PathLike[str], report: Report) -> list[Path]:
    """Writes ``report.json`` and ``report.html`` into a folder, each whole or not at all.

    Args:
        folder: that exists.
        report: of :func:`as_dict` or :func:`read_report`.

    Returns:
        The files.

    Raises:
        OSError: where they cannot be written.
        ValueError: where the report is none.
    """
    check_report("write_report", report)
    contents = {JSON_NAME: json.dumps(report, indent=1, allow_nan=False) + "\n", HTML_NAME: page(report)}
    files = []
    for name, text in contents.items():
        file = Path(folder) / name
        with replacing(file) as new:
            new.write_text(text, encoding="utf-8")
        files.append(file)
    return files


def page(report: Report) -> str:
    """The report as HTML; without matplotlib it has no plots, and says so."""
    title = report["model"] or "A quantized model"
    totals = report["totals"]
    what = f"{totals['layers']} layers quantized by miniquant {report['miniquant']}"
    what += "" if report["format"] is None else f", format {report['format']}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="sub">{_text(what)}</p>',
        _cards(report),
        _notes(report),
        *_plots(report),
        "<h2>By kind of layer</h2>",
        _kinds(by_kind(report)),
        "<h2>Layers</h2>",
        _layers(report),
        _left_alone(report),
        _how(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}: miniquant report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<footer>The figures are in report.json, beside this file.</footer>\n<script>{_SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _cards(report: Report) -> str:
    """The figures that are asked for first."""
    totals, size = report["totals"], report["bytes"]
    cards = []
    tokens = judged_on(report)
    if tokens is not None:
        found = totals["loss_ratio"][tokens]
        on = "held-out" if tokens == "held_out" else "calibration"
        cards.append((units.ratio(found["geometric_mean"]), f"loss relative to RTN, geometric mean, {on} tokens"))
    if totals["bits_per_weight"] is not None:
        cards.append((f"{totals['bits_per_weight']:.2f}", "bits per quantized weight, scales included"))
    if size["before"] and size["after"] is not None:
        share = f"{size['after'] / size['before']:.2f} of it"
        cards.append((f"{units.size(size['after'])}", f"of weights; before {units.size(size['before'])}: {share}"))
    cards.append((f"{totals['gptq']} + {totals['rtn']}", "layers by GPTQ + rounded to nearest"))
    if "total" in report["seconds"]:
        cards.append((units.duration(report["seconds"]["total"]), "in all"))
    if report["peak_memory"] is not None:
        cards.append((units.size(report["peak_memory"]), "of memory at most"))
    inner = "".join(
        f'<div class="card"><b>{_text(figure)}</b><span>{_text(what)}</span></div>' for figure, what in cards
    )
    return f'<div class="cards">{inner}</div>'


def _notes(report: Report) -> str:
    """What a person should know."""
    notes = [_text(note) for note in report["notes"]]
    notes += [f"<b>{_text(layer['name'])}</b>: {_text(note)}" for layer in report["layers"] for note in layer["notes"]]
    if not notes:
        return ""
    shown, more = notes[:20], len(notes) - 20
    items = "".join(f"<li>{note}</li>" for note in shown)
    items += f"<li>and {more} more, in the table of layers</li>" if more > 0 else ""
    return f'<div class="notes"><b>To know</b><ul>{items}</ul></div>'


def _plots(report: Report) -> list[str]:
    try:
        drawn = plots(report)
    except ImportError:
        why = "they are drawn with matplotlib, which was not installed (<code>pip install 'miniquant[plots]'</code>)"
        return [f'<div class="notes">This report has no plots: {why}. The tables have all figures.</div>']
    figures = []
    for plot in drawn:
        source = base64.b64encode(plot.svg).decode()
        image = f'<img src="data:image/svg+xml;base64,{source}" alt="{_text(plot.description)}">'
        figures.append(f"<figure>{image}<figcaption>{_text(plot.description)}</figcaption></figure>")
    return figures


def _table(
    columns: Sequence[_Column], rows: Iterable[Sequence[_Cell]], classes: Sequence[str] = (), *, sortable: bool = True
) -> str:
    """A table; `classes` has one for each row."""
    heads = "".join(f'<th class="{column.kind}">{_text(column.heading)}</th>' for column in columns)
    body = []
    for number, row in enumerate(rows):
        cells = []
        for column, cell in zip(columns, row, strict=True):
            value = "" if cell.value is None else f' data-value="{cell.value!r}"'
            cells.append(f'<td class="{column.kind}"{value}>{_text(cell.text)}</td>')
        name = f' class="{classes[number]}"' if number < len(classes) and classes[number] else ""
        body.append(f"<tr{name}>{''.join(cells)}</tr>")
    kind = ' class="sortable"' if sortable else ""
    inner = "\n".join(body)
    return f'<div class="scroll"><table{kind}><thead><tr>{heads}</tr></thead>\n<tbody>\n{inner}\n</tbody></table></div>'


def _number(value: float | None, text: str) -> _Cell:
    return _Cell(text, -1.0 if value is None else value)


def _kinds(kinds: Sequence[Kind]) -> str:
    columns = [
        *(_Column("kind", "text"), _Column("layers"), _Column("RTN"), _Column("bits"), _Column("group")),
        *(_Column("loss / RTN, mean"), _Column("worst"), _Column("seconds"), _Column("before"), _Column("after")),
    ]
    rows = []
    for kind in kinds:
        before, after = kind.total("bytes_before"), kind.total("bytes_after")
        seconds = kind.total("seconds")
        nearest = sum(layer["method"] == "rtn" for layer in kind.layers)
        rows.append(
            [
                _Cell(kind.kind),
                _number(len(kind.layers), str(len(kind.layers))),
                _number(nearest, str(nearest)),
                _Cell(", ".join(kind.grids())),
                _Cell(", ".join(_group(size) for size in kind.values("group_size"))),
                _number(kind.ratio, units.ratio(kind.ratio)),
                _number(kind.worst, units.ratio(kind.worst)),
                _number(seconds, f"{seconds:.2f}"),
                _number(before, units.size(before)),
                _number(after, units.size(after)),
            ]
        )
    return _table(columns, rows)


def _layers(report: Report) -> str:
    """Every layer."""
    columns = [
        *(_Column("layer", "text"), _Column("N × K"), _Column("bits"), _Column("group"), _Column("by", "text")),
        *(_Column("held-out tokens"), _Column("loss on them"), _Column("RTN"), _Column("ratio")),
        *(_Column("calibration tokens"), _Column("loss on them"), _Column("RTN"), _Column("ratio")),
        *(_Column("ridge"), _Column("seconds"), _Column("bytes"), _Column("notes", "text long")),
    ]
    rows, classes = [], []
    for layer in report["layers"]:
        n, k = layer["shape"]
        rows.append(
            [
                _Cell(layer["name"]),
                _number(n * k, f"{n} × {k}"),
                _number(layer["bits"], grid_of_layer(layer)),
                _number(layer["group_size"], _group(layer["group_size"])),
                _Cell("RTN" if layer["method"] == "rtn" else layer["preset"]),
                *_losses(layer, "held_out"),
                *_losses(layer, "calibration"),
                _number(layer["ridge"], units.loss(layer["ridge"])),
                _number(layer["seconds"], f"{layer['seconds']:.2f}"),
                _number(layer["bytes_after"], units.size(layer["bytes_after"])),
                _Cell("; ".join(layer["notes"])),
            ]
        )
        classes.append("rtn" if layer["method"] == "rtn" else "")
    return _table(columns, rows, classes)


def _losses(layer: Any, tokens: str) -> list[_Cell]:
    prefix = "held_out_" if tokens == "held_out" else ""
    count, loss, nearest = layer[f"{prefix}tokens"], layer[f"{prefix}loss"], layer[f"{prefix}rtn_loss"]
    relative = ratio(layer, tokens)
    return [
        _number(count, f"{count:,}"),
        _number(loss, units.loss(loss)),
        _number(nearest, units.loss(nearest)),
        _number(relative, units.ratio(relative)),
    ]


def _group(size: int) -> str:
    return "row" if size == -1 else str(size)


def _left_alone(report: Report) -> str:
    if not report["left_alone"]:
        return ""
    columns = [_Column("parameter", "text"), _Column("shape"), _Column("why", "text long")]
    rows = [
        [_Cell(one["name"]), _Cell(" × ".join(map(str, one["shape"]))), _Cell(one["reason"])]
        for one in report["left_alone"]
    ]
    return f"<h2>Not quantized</h2>\n{_table(columns, rows, sortable=False)}"


def _how(report: Report) -> str:
    """What was asked for, and what it was calibrated on."""
    calibration = report["calibration"]
    facts: list[tuple[str, object]] = list(report["settings"].items())
    facts += [("batches", calibration["batches"]), ("held-out batches", calibration["held_out_batches"])]
    if calibration["tokens"] is not None:
        facts.append(("calibration tokens", f"{calibration['tokens']:,}"))
    facts += [
        (f"from {source['name']}", f"{source['tokens']:,} tokens in {source['windows']:,} windows")
        for source in calibration["sources"]
    ]
    rows = [[_Cell(str(name)), _Cell("–" if value is None else str(value))] for name, value in facts]  # noqa: RUF001
    table = _table([_Column("what", "text"), _Column("value", "text long")], rows, sortable=False)
    recipe = report["recipe"]
    shown = "" if recipe is None else f"<h2>Recipe</h2>\n<pre>{_text(json.dumps(recipe, indent=2))}</pre>"
    return f"<h2>How it was made</h2>\n{table}\n{shown}"
