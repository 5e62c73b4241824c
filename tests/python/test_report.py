"""Reports: report.json against its schema, the page, its plots, the tables and the progress of a terminal."""

from __future__ import annotations

import base64
import copy
import html.parser
import io
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import torch
from rich.console import Console

from miniquant import LayerOptions, ModelResult, QuantizedWeight, Recipe, Rule, quantize_model, report, units
from miniquant.calibration import Calibration, SourceTokens
from miniquant.formats import Gptq, Native, layer_format
from miniquant.formats.base import LayerGrid
from miniquant.modules import LeftAlone
from miniquant.report import Place, as_dict, by_kind, place_of, ratio, read_report, worst_layers
from miniquant.report_page import page, write_report
from miniquant.terminal import Progress, console_of, report_tables
from small_models import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from miniquant import LayerResult

RECIPE = Recipe(
    LayerOptions(group_size=16, preset="fast", min_tokens=1),
    [Rule("*.down_proj", {"bits": 3, "group_size": -1}), Rule("*.1.self_attn.o_proj", {"symmetric": False})],
)


@pytest.fixture(scope="module")
def result() -> ModelResult:
    """A small Llama, quantized, with two of its three batches for calibration and one held out."""
    make, batches = MODELS["llama"]
    *calibration, held_out = batches()
    return quantize_model(make(), calibration, RECIPE, held_out=[held_out])


@pytest.fixture
def made(result: ModelResult) -> dict[str, Any]:
    calibration = Calibration((), (), 31, 23, (SourceTokens("a.txt", 5, 54, 23),), False, ("31 tokens instead of 64",))
    return as_dict(
        result,
        model="llama & co",
        format="miniquant",
        recipe=RECIPE,
        calibration=calibration,
        settings={"device": "cpu", "threads": 1, "dtype": "float32"},
        bytes_before=200_000,
        bytes_after=50_000,
        peak_memory=123_456_789,
        notes=calibration.notes,
    )


def test_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(report.SCHEMA.read_text()))


def test_layers_are_those_of_the_result(result: ModelResult, made: dict[str, Any]) -> None:
    assert [layer["name"] for layer in made["layers"]] == list(result.layers)
    for reported, layer in zip(made["layers"], result.layers.values(), strict=True):
        assert reported["shape"] == list(layer.quantized.codes.shape)
        for key in ("bits", "group_size", "symmetric", "full_range"):
            assert reported[key] == getattr(layer.quantized, key)
        for key in ("method", "tokens", "held_out_tokens", "ridge", "loss", "rtn_loss", "held_out_loss", "seconds"):
            assert reported[key] == getattr(layer, key)
        assert reported["held_out_rtn_loss"] == layer.held_out_rtn_loss
        assert reported["bytes_before"] == 4 * layer.quantized.codes.numel()
    of_down = next(layer for layer in made["layers"] if layer["name"].endswith("down_proj"))
    assert (of_down["bits"], of_down["group_size"]) == (3, -1)
    assert {one["name"] for one in made["left_alone"]} == {"model.embed_tokens.weight", "lm_head.weight"}


def test_totals_are_sums_over_layers(result: ModelResult, made: dict[str, Any]) -> None:
    layers, totals = result.layers.values(), made["totals"]
    assert totals["layers"] == 14
    assert totals["gptq"] == sum(layer.method == "gptq" for layer in layers)
    assert totals["gptq"] + totals["rtn"] == 14
    weights = sum(layer.quantized.codes.numel() for layer in layers)
    assert totals["weights"] == weights
    assert totals["bytes_before"] == 4 * weights
    assert totals["bits_per_weight"] == 8 * totals["bytes_after"] / weights
    ratios = {
        layer.name: layer.held_out_loss / layer.held_out_rtn_loss
        for layer in layers
        if layer.held_out_loss is not None and layer.held_out_rtn_loss
    }
    found = totals["loss_ratio"]["held_out"]
    assert found["layers"] == len(ratios) == 14
    assert found["geometric_mean"] == pytest.approx(math.prod(ratios.values()) ** (1 / 14), rel=1e-12)
    assert found["worst"] == max(ratios.values())
    assert ratios[found["worst_layer"]] == found["worst"]
    assert made["notes"] == [*result.notes, "31 tokens instead of 64"]
    assert made["calibration"]["sources"] == [{"name": "a.txt", "windows": 5, "tokens": 54, "held_out": 23}]
    assert Recipe.from_dict(made["recipe"]) == RECIPE


def quantized(bits: int, group_size: int, *, symmetric: bool, dtype: torch.dtype) -> QuantizedWeight:
    grid = LayerGrid(64, 96, bits, group_size, symmetric, False, dtype)
    codes = torch.zeros(64, 96, dtype=torch.int8)
    parts = (torch.ones(64, grid.groups, dtype=dtype), torch.zeros(64, grid.groups, dtype=torch.int8))
    return QuantizedWeight(codes, *parts, bits, group_size, symmetric, False)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize(("group_size", "dtype"), [(32, torch.float32), (-1, torch.bfloat16)])
def test_stored_bytes_are_those_of_our_format(bits: int, group_size: int, dtype: torch.dtype) -> None:
    weight = quantized(bits, group_size, symmetric=True, dtype=dtype)
    assert report.stored_bytes(LayerGrid.of(weight)) == sum(t.nbytes for t in Native().tensors("a", weight).values())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_stored_bytes_of_zero_points_are_those_of_gptq(bits: int) -> None:
    weight = quantized(bits, 32, symmetric=False, dtype=torch.float16)
    tensors = Gptq(version=2).tensors("a", weight)
    assert (
        report.stored_bytes(LayerGrid.of(weight)) == sum(t.nbytes for t in tensors.values()) - tensors["a.g_idx"].nbytes
    )


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.7.self_attn.q_proj", "model.layers.7", "self_attn.q_proj"),
        ("model.layers.0.mlp.experts.3.up_proj", "model.layers.0", "mlp.experts.*.up_proj"),
        ("model.layers.0.mlp.experts.down_proj.12", "model.layers.0", "mlp.experts.down_proj.*"),
        ("decoder.block.1.layer.0.SelfAttention.q", "decoder.block.1", "layer.*.SelfAttention.q"),
        ("layers.10.fc", "layers.10", "fc"),
        ("0.fc", "0", "fc"),
        ("lm_head", "", "lm_head"),
        ("classifier.2", "", "classifier.*"),
        ("layer1.conv2d", "", "layer1.conv2d"),
    ],
)
def test_place(name: str, block: str, kind: str) -> None:
    assert place_of(name) == Place(block, kind)


@pytest.mark.parametrize(
    ("loss", "nearest", "expected"),
    [(1.0, 4.0, 0.25), (0.0, 0.0, 1.0), (1.0, 0.0, None), (None, 1.0, None), (1.0, None, None), (0.0, 2.0, 0.0)],
)
def test_ratio(loss: float | None, nearest: float | None, expected: float | None) -> None:
    layer = {"loss": loss, "rtn_loss": nearest, "held_out_loss": nearest, "held_out_rtn_loss": loss}
    assert ratio(layer, "calibration") == expected


def test_kinds_and_worst(made: dict[str, Any]) -> None:
    kinds = by_kind(made)
    assert [kind.kind for kind in kinds] == [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
    for kind in kinds:
        of_kind = [ratio(layer) for layer in made["layers"] if layer["name"].endswith(kind.kind)]
        known = [value for value in of_kind if value is not None]
        assert len(kind.layers) == len(known) == 2
        assert kind.ratio == pytest.approx(math.sqrt(known[0] * known[1]))
        assert kind.worst == max(known)
    worst = worst_layers(made, 3)
    every = sorted((value for layer in made["layers"] if (value := ratio(layer)) is not None), reverse=True)
    assert [value for _, value in worst] == every[:3]


def test_no_layer_and_no_tokens(made: dict[str, Any]) -> None:
    empty = as_dict(ModelResult())
    assert empty["totals"]["bits_per_weight"] is None
    assert empty["totals"]["loss_ratio"] == {"held_out": None, "calibration": None}
    assert "<table" in page(empty)
    printed(empty, 80)


def test_losses_that_are_no_numbers_are_said(result: ModelResult) -> None:
    name, layer = next(iter(result.layers.items()))
    changed = replace(layer, held_out_loss=math.inf)
    reported = as_dict(ModelResult({name: changed}))["layers"][0]
    assert reported["held_out_loss"] is None
    assert reported["notes"][-1] == "held_out_loss is not finite"


# Files


def test_written_files_come_back(made: dict[str, Any], tmp_path: Path) -> None:
    files = write_report(tmp_path, made)
    assert files == [tmp_path / "report.json", tmp_path / "report.html"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert read_report(tmp_path) == read_report(tmp_path / "report.json") == made
    jsonschema.validate(json.loads(files[0].read_text()), json.loads(report.SCHEMA.read_text()))


def damages() -> Iterator[tuple[str, Callable[[dict[str, Any]], object]]]:
    for key in json.loads(report.SCHEMA.read_text())["required"]:
        yield f"no {key}", lambda made, key=key: made.pop(key)  # type: ignore[misc]
    yield "unknown key", lambda made: made.update(more=1)
    yield "other version", lambda made: made.update(schema_version=2)
    yield "layer without bits", lambda made: made["layers"][3].pop("bits")
    yield "9 bits", lambda made: made["layers"][3].update(bits=9)
    yield "loss as text", lambda made: made["layers"][3].update(loss="1")
    yield "negative loss", lambda made: made["layers"][3].update(loss=-1.0)
    yield "shape of three", lambda made: made["layers"][3].update(shape=[1, 2, 3])
    yield "unknown format", lambda made: made.update(format="awq")
    yield "seconds of text", lambda made: made["seconds"].update(total="long")


@pytest.mark.parametrize("damage", [pytest.param(damage, id=name) for name, damage in damages()])
def test_schema_refuses(made: dict[str, Any], tmp_path: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    damaged = copy.deepcopy(made)
    damage(damaged)
    with pytest.raises(ValueError, match="write_report: expected a report, but at"):
        write_report(tmp_path, damaged)
    assert not list(tmp_path.iterdir())
    file = tmp_path / "report.json"
    file.write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=rf"read_report: {re.escape(str(file))}: expected a report, but at"):
        read_report(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        read_report(file)


# The page


class Parsed(html.parser.HTMLParser):
    """Checks that elements are closed in order, and notes what a test asks for."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.images: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        values = dict(attrs)
        if tag == "img":
            assert len(values["alt"] or "") > 40
            self.images.append(values["src"] or "")
        self.links += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_needs_no_other_file(made: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    text = page(made)
    parsed = Parsed(text)
    assert parsed.links == parsed.images
    assert len(parsed.images) == 3
    for image in parsed.images:
        head, _, data = image.partition(",")
        assert head == "data:image/svg+xml;base64"
        root = ET.fromstring(base64.b64decode(data))  # noqa: S314  (our own)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter())) > 100
    assert "llama &amp; co" in text
    for layer in made["layers"]:
        assert f'<td class="text">{layer["name"]}</td>' in text
    assert page(made) == text


def test_page_escapes_what_a_folder_says(made: dict[str, Any]) -> None:
    hostile = copy.deepcopy(made)
    attack = "<script>alert(1)</script>\"'&"
    hostile["model"] = hostile["notes"][0] = attack
    hostile["layers"][0]["name"] = hostile["left_alone"][0]["reason"] = hostile["settings"]["device"] = attack
    hostile["layers"][0]["notes"] = [attack]
    hostile["recipe"] = {"rules": [{"pattern": attack}]}
    assert Parsed(page(hostile)).counts["script"] == 1


def test_page_without_matplotlib_says_so(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = page(made)
    assert "pip install 'miniquant[plots]'" in text
    assert "img" not in Parsed(text).counts
    assert made["layers"][0]["name"] in text


def figures(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    report_plots = pytest.importorskip("miniquant.report_plots")
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    real = report_plots._svg

    def noted(figure: Any) -> bytes:
        drawn.append(figure)
        svg: bytes = real(figure)
        return svg

    monkeypatch.setattr(report_plots, "_svg", noted)
    report_plots.plots(made)
    return drawn


def test_plots_show_the_figures(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    losses, worst, parts = figures(made, monkeypatch)
    lines = {line.get_label().split("  ")[0]: line for line in losses.axes[0].lines}
    for kind in by_kind(made):
        assert list(lines[kind.kind].get_ydata()) == [ratio(layer) for layer in kind.layers]
        assert list(lines[kind.kind].get_xdata()) == [0, 1]
    widths = [bar.get_width() for bar in worst.axes[0].patches]
    assert widths == [value for _, value in worst_layers(made, 12)][::-1]
    seconds, sizes = parts.axes
    assert sorted(bar.get_width() for bar in seconds.patches) == sorted(
        value for name, value in made["seconds"].items() if name != "total"
    )
    assert sum(bar.get_width() for bar in sizes.patches) == 200_000 + 50_000


def test_plots_of_experts_and_of_two_lists_of_blocks(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    several = copy.deepcopy(made)
    layer = {**several["layers"][0], "held_out_rtn_loss": 1.0, "method": "gptq", "notes": []}
    names = [f"{side}.layers.{block}.experts.{expert}.fc" for side in "ab" for block in (2, 5) for expert in range(3)]
    several["layers"] = [
        {**layer, "name": name, "held_out_loss": 0.1 * number} for number, name in enumerate((*names, "head"))
    ]
    several["layers"][4]["method"] = "rtn"
    losses = figures(several, monkeypatch)[0].axes[0]
    lines = [list(line.get_ydata()) for line in losses.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert [[round(value, 6) for value in line] for line in lines] == [[0.1, 0.4], [0.7, 1.0]]  # medians
    assert [label.get_text() for label in losses.get_xticklabels()] == ["2", "5", "2", "5", ""]


def test_plots_of_many_layers_stay_small(made: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    from miniquant.report_plots import plots  # noqa: PLC0415

    many = copy.deepcopy(made)
    layer = many["layers"][0]
    many["layers"] = [
        {**layer, "name": f"model.layers.{block}.experts.{expert}.fc{kind}"}
        for block in range(8)
        for expert in range(128)
        for kind in range(4)
    ]
    assert max(len(plot.svg) for plot in plots(many)) < 500_000


# The terminal


def printed(made: dict[str, Any], width: int, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(report_tables(made, width=width, **options))
    output: str = console.file.getvalue()  # type: ignore[attr-defined]
    return output


@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize("width", [50, 60, 80, 100, 120, 160])
def test_tables_fit(made: dict[str, Any], width: int, every_layer: bool) -> None:
    output = printed(made, width, every_layer=every_layer)
    assert max(map(len, output.splitlines())) <= width
    assert "…" not in output
    assert units.ratio(made["totals"]["loss_ratio"]["held_out"]["geometric_mean"]) in output


def test_tables_have_every_kind_or_layer(made: dict[str, Any]) -> None:
    kinds = printed(made, 240)
    for kind in by_kind(made):
        assert re.search(
            rf"^{re.escape(kind.kind)} +2 .* {units.ratio(kind.ratio)} +{units.ratio(kind.worst)} ", kinds, re.MULTILINE
        )
    layers = printed(made, 240, every_layer=True)
    for layer in made["layers"]:
        assert re.search(rf"^{re.escape(layer['name'])} .* {units.ratio(ratio(layer))} ", layers, re.MULTILINE)


def test_notes_beyond_ten_are_counted(made: dict[str, Any]) -> None:
    noted = copy.deepcopy(made)
    noted["notes"] = [f"note {number}" for number in range(13)]
    for layer in noted["layers"]:
        layer["notes"] = []
    output = printed(noted, 80)
    assert output.count("note: note") == 10
    assert "note: and 3 more" in output


def test_console_in_a_pipe_cuts_no_name() -> None:
    code = (
        "import sys; from miniquant.terminal import console_of, table\n"
        "made = table(None, [('name', False)]); made.add_row('x' * 200)\n"
        "console_of(sys.stdout).print(made, style='red')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    output = run.stdout
    assert "x" * 200 in output
    assert "\x1b" not in output


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown() -> str:
        stream = Terminal()
        console_of(stream).print("x", style="red")
        return stream.getvalue()

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[31m" in shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in shown()


class Clock:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def layer(result: ModelResult) -> LayerResult:
    found = next(iter(result.layers.values()))
    return replace(found, held_out_loss=1.0, held_out_rtn_loss=4.0, notes=())


def test_progress_in_a_pipe(layer: LayerResult, caplog: pytest.LogCaptureFixture) -> None:
    clock, stream = Clock(), io.StringIO()
    caplog.set_level("INFO", "miniquant")
    with Progress(tokens=1000, console=Console(file=stream, width=240), interval=5, clock=clock) as progress:
        progress.stage("reads the model")
        for number in range(1, 11):
            clock.now += 2
            notes = ("keeps rounding to nearest",) if number == 6 else ()
            progress.layer(replace(layer, name=f"layers.{number}.fc", notes=notes), number, 10)
    lines = [re.sub(r"[\d.]+ [kMG]?B", "MEMORY", line) for line in stream.getvalue().splitlines()]
    assert lines == [
        "reads the model",
        "1/10  layers.1.fc  loss 0.250 of RTN  MEMORY",
        "4/10  layers.4.fc  loss 0.250 of RTN  50 tokens/s  MEMORY  12.0 s left",
        "layers.6.fc: keeps rounding to nearest",
        "7/10  layers.7.fc  loss 0.250 of RTN  50 tokens/s  MEMORY  6.00 s left",
        "10/10  layers.10.fc  loss 0.250 of RTN  50 tokens/s  MEMORY",
    ]
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 12
    assert logged[2].startswith("layer 2 of 10: layers.2.fc: loss 0.250 of RTN")
    assert "layer layers.6.fc: keeps rounding to nearest" in logged


def test_time_left_follows_the_speed_of_the_last_layers(layer: LayerResult) -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(console=Console(file=stream, width=240), interval=0, clock=clock) as progress:
        for number in range(1, 101):
            clock.now += 0 if number <= 50 else 3  # the first half was done before, and is only read
            progress.layer(layer, number, 120)
    assert stream.getvalue().splitlines()[-1].endswith("60.0 s left")


@pytest.mark.parametrize("width", [30, 60, 80, 130])
def test_progress_on_a_terminal(layer: LayerResult, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, width=width, force_terminal=True, legacy_windows=False, _environ={})
    with Progress(tokens=1000, console=console, clock=clock) as progress:
        progress.stage("reads the model")
        for number in range(1, 4):
            clock.now += 1
            progress.layer(replace(layer, name="model.layers.0.self_attn.q_proj"), number, 3)
        assert progress._bar is not None
        progress._bar.refresh()
    plain = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", stream.getvalue())
    lines = re.split(r"[\r\n]+", plain)
    assert max(map(len, lines)) <= width
    assert any("3/3" in line for line in lines)
    assert any("loss 0.250 of RTN" in line for line in lines) == (width >= 70)
    assert any("self_attn.q_proj" in line for line in lines) == (width >= 110)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (999_499, "999 kB"), (999_999, "1.00 MB")],
)
def test_size(count: int, text: str) -> None:
    assert units.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0421, "42 ms"),
        (1, "1.00 s"),
        (99.94, "99.9 s"),
        (99.96, "1 min 40 s"),
        (3599.6, "1 h 00 min"),
        (12_345, "3 h 26 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


def test_report_of_what_each_format_is_called(result: ModelResult) -> None:
    for name in ("compressed-tensors", "gptq", "gptq_v2", "gguf", "miniquant"):
        assert as_dict(result, format=layer_format(name).name if name != "gguf" else name)["format"] == name


def test_left_alone_without_dimensions() -> None:
    made = as_dict(ModelResult(left_alone=(LeftAlone("a.weight", (), "why"),)))
    assert made["left_alone"] == [{"name": "a.weight", "shape": [], "reason": "why"}]
