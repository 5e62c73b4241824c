"""What a run would do: sizes and layers as they then are, time and memory near what they then are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from miniquant import LayerOptions, Recipe, Rule, cli, quantize_folder
from miniquant.formats import LayerGrid
from miniquant.preflight import Measured, PlannedLayer, estimated_seconds, more_bytes, preflight, preflight_tables
from miniquant.report import read_report
from model_folder import QUICK, VOCABULARY, make_folder
from small_models import decoder

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("transformers")

RECIPE = Recipe(
    LayerOptions(group_size=16, preset="fast"),
    [Rule("*.0.mlp.*", {"bits": 8}), Rule("*.1.self_attn.k_proj", {"skip": True})],
)
OPTIONS: dict[str, Any] = {"tokens": 512, "sequence_length": 64, "dtype": torch.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = decoder("Llama", vocab_size=VOCABULARY, max_position_embeddings=128, num_hidden_layers=5)
    return make_folder(tmp_path_factory.mktemp("preflight") / "llama", model)


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Path]:
    """A folder to run in, in which nothing may be left."""
    yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["compressed-tensors", "miniquant"])
def test_layers_and_sizes_are_those_of_the_run(folder: Path, tmp_path: Path, form: Any) -> None:
    planned = preflight(folder, tmp_path / "out", recipe=RECIPE, format=form, measure=False, **OPTIONS)
    assert not list(tmp_path.iterdir())
    assert planned.seconds is None
    done = quantize_folder(folder, tmp_path / "out", RECIPE, format=form, **OPTIONS)
    report = read_report(tmp_path / "out")
    assert [layer.name for layer in planned.layers] == [layer["name"] for layer in report["layers"]]
    for layer, reported in zip(planned.layers, report["layers"], strict=True):
        assert [layer.grid.rows, layer.grid.columns] == reported["shape"]
        assert (layer.grid.bits, layer.grid.group_size) == (reported["bits"], reported["group_size"])
        assert layer.bytes_before == reported["bytes_before"]
    assert {one.name: one.reason for one in planned.left_alone} == {
        one["name"]: one["reason"] for one in report["left_alone"]
    }
    assert planned.bytes_before == done.bytes_before
    assert planned.bytes_after == done.bytes_after
    assert planned.tokens == report["calibration"]["tokens"]
    assert planned.held_out_tokens == report["calibration"]["held_out_tokens"]


def test_measured_and_nothing_left(folder: Path, nothing_left: Path) -> None:
    found = preflight(folder, nothing_left / "out", recipe=RECIPE, **OPTIONS)
    assert found.seconds is not None
    assert found.memory is not None
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert all(seconds >= 0 for seconds in found.parts.values())
    assert found.parts["layers"] > 0
    assert found.memory > 1e8  # of the process, torch included


def test_nothing_is_left_after_an_error(folder: Path, nothing_left: Path) -> None:
    from miniquant import QuantizationError  # noqa: PLC0415

    recipe = LayerOptions(group_size=16, min_tokens=100_000)
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.self_attn\.q_proj saw"):
        preflight(folder, nothing_left / "out", recipe=recipe, **OPTIONS)


def test_what_the_run_refuses_is_refused(folder: Path, nothing_left: Path) -> None:
    with pytest.raises(ValueError, match="group_size of layer"):
        preflight(folder, nothing_left / "out", recipe=LayerOptions(group_size=20), format="gptq", **OPTIONS)


def planned_layer(name: str, rows: int = 32, columns: int = 64) -> PlannedLayer:
    grid = LayerGrid(rows, columns, 4, 32, True, False, torch.float32)
    return PlannedLayer(name, grid, LayerOptions(), 4 * rows * columns, 1000)


def test_time_is_that_of_the_last_measured_layer_of_a_kind() -> None:
    layers = [planned_layer(f"layers.{block}.{kind}") for block in range(10) for kind in ("a", "b")]
    seconds = {"layers.0.a": 9.0, "layers.0.b": 3.0, "layers.1.a": 1.0, "layers.1.b": 2.0}
    parts = estimated_seconds(layers, Measured(seconds, 0.001, 5.0, 0), 700)
    assert parts == {"layers": 15 + 8 * 3, "writing": pytest.approx(0.7), "report": 5.0}


def test_time_of_a_kind_that_was_not_measured_is_by_operations() -> None:
    layers = [planned_layer("a.0.x"), planned_layer("a.0.y"), planned_layer("b.0.z", rows=320), planned_layer("head")]
    seconds = {"a.0.x": 100.0, "a.0.y": 2.0}  # the first also has the start of the run
    parts = estimated_seconds(layers, Measured(seconds, 0, 0, 0), 0)
    ratio = layers[2].operations / layers[1].operations
    assert 5 < ratio < 10
    assert parts["layers"] == pytest.approx(102 + 2 * ratio + 2)


def test_memory_of_blocks_that_come_later() -> None:
    sizes = {"embed": 900, "h.0": 10, "h.1": 20, "h.10": 50, "head": 30}
    layers = ["h.0.a", "h.1.a", "h.10.a.b", "head"]
    assert more_bytes(sizes, layers, layers[:2], lazy=True) == 30
    assert more_bytes(sizes, layers, layers[:3], lazy=True) == 0
    assert more_bytes(sizes, layers, layers[:2], lazy=False) == 80


def test_dry_run(folder: Path, nothing_left: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(nothing_left)
    arguments = ["quantize", str(folder), "out", *QUICK, "--dry-run", "--skip", "*.k_proj"]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "would be quantized" in output
    assert "mlp.gate_proj" in output
    assert "is skipped by the recipe" in output
    assert "time: about " in output
    assert "memory: about " in output


@pytest.mark.parametrize("width", [50, 80, 120])
def test_tables_fit(folder: Path, nothing_left: Path, width: int) -> None:
    from rich.console import Console  # noqa: PLC0415

    found = preflight(folder, nothing_left / "out", recipe=RECIPE, measure=False, **OPTIONS)
    console = Console(width=width, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    console.print(preflight_tables(found, width=width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any("self_attn.q_proj" in line for line in lines)


@pytest.mark.nightly
def test_time_and_memory_of_smollm2(tmp_path: Path, smollm2_folder: Path) -> None:
    """Within a quarter of what then happens."""
    code = (
        "import json, resource, sys, time, torch; from miniquant import LayerOptions, quantize_folder\n"
        "from miniquant.preflight import preflight\n"
        "options = dict(recipe=LayerOptions(preset='fast'), tokens=16384, sequence_length=512, dtype=torch.float32)\n"
        "start = time.perf_counter()\n"
        "if sys.argv[1] == 'plan':\n"
        "    found = preflight('smol', 'out', **options); print(json.dumps([found.seconds, found.memory]))\n"
        "else:\n"
        "    quantize_folder('smol', 'out', **options); seconds = time.perf_counter() - start\n"
        "    print(json.dumps([seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))"
    )

    def run(what: str) -> list[float]:
        done = subprocess.run(
            [sys.executable, "-c", code, what], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        found: list[float] = json.loads(done.stdout.splitlines()[-1])
        return found

    (tmp_path / "smol").symlink_to(smollm2_folder)
    (planned_seconds, planned_memory), (seconds, memory) = run("plan"), run("run")
    print(f"time: planned {planned_seconds:.1f} s, was {seconds:.1f} s; memory: {planned_memory:.3g}, was {memory:.3g}")
    assert planned_seconds == pytest.approx(seconds, rel=0.25)
    assert planned_memory == pytest.approx(memory, rel=0.25)
