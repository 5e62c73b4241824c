"""The benchmarks: their counts, times and scores are right, and their tables show their figures."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import gguf_examples
import miniquant
from benchmarks.common import measuring
from benchmarks.common.tables import table
from benchmarks.models import blocks, encoder, gguf, texts
from benchmarks.models.common import docstrings, halves, readable
from benchmarks.peers import __main__ as compare_peers
from benchmarks.peers.runner import Problem
from benchmarks.speed import __main__ as speed
from benchmarks.speed import against, units
from miniquant.formats import Gguf
from miniquant.output import planned_grid

ROOT = Path(__file__).resolve().parents[2]
TINY = speed.Plan(
    layers=[speed.Layer(40, 64, 32), speed.Layer(24, 32, 16, copies=3)],
    inputs=[speed.Inputs(96, 64)],
    option_layers=[speed.Layer(24, 64, 32)],
    # Large enough for the error of Linux's counters of pages, up to 0.8 MB, to be small.
    memory_layers=[speed.Layer(2048, 2048, 128)],
    thread_layers=[speed.Layer(24, 64, 32)],
    thread_inputs=[speed.Inputs(96, 64)],
    shared_layers=[speed.Layer(24, 64, 32)],
    growth=[32, 64],
    growth_group_size=32,
)
TINY_CASE = "48,64,32,96"


def test_counts_are_those_of_the_loops() -> None:
    """One multiplication and one addition for each term of each sum, to leading order."""
    rows, columns, tokens = 3, 400, 7
    sweep = sum(2 * j for j in range(columns))
    cholesky = sum(2 * (columns - 1 - j) for j in range(columns) for _ in range(j + 1))
    triangle = sum(2 * tokens for j in range(columns) for _ in range(j + 1))
    assert measuring.gptq_flops(rows, columns) == pytest.approx(rows * sweep + cholesky, rel=2 / columns)
    assert measuring.gptq_flops(0, columns) == pytest.approx(cholesky, rel=2 / columns)
    assert measuring.hessian_flops(tokens, columns) == pytest.approx(triangle, rel=2 / columns)
    assert measuring.product_flops(2, 3, 5) == 2 * 2 * 3 * 5


@pytest.mark.parametrize(("least_seconds", "rounds"), [(0.0, measuring.LEAST_ROUNDS), (5.0, 6)])
def test_interleaved_takes_turns_and_the_shortest(
    monkeypatch: pytest.MonkeyPatch, least_seconds: float, rounds: int
) -> None:
    clock = 0.0
    calls: list[str] = []
    takes = {"a": [0.01, 2.0, 1.0], "b": [0.02, 0.5, 0.75]}

    def run(name: str) -> None:
        nonlocal clock
        calls.append(name)
        # The first call, which is the shortest, does not count; from the third on all take the same: turns end at
        # 2.5, 4.25, 6, ... and 11.25 seconds, the first past twice five.
        clock += takes[name][min(calls.count(name), 3) - 1]

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    times = measuring.interleaved({name: partial(run, name) for name in takes}, least_seconds)
    assert calls == ["a", "b"] * (1 + rounds)
    assert times == pytest.approx({"a": 1.0, "b": 0.5})


def test_the_machine_has_the_instruction_set_of_the_kernels() -> None:
    command = "from benchmarks.common.measuring import machine; print(machine(1)['instruction_set'])"
    run = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "MINIQUANT_ISA": "baseline"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "baseline\n"


def expect_timed(row: dict[str, Any]) -> None:
    assert row["seconds"] > 0
    assert row["limit_seconds"] == pytest.approx(row["product_seconds"] * row["flops"] / row["product_flops"])


def test_speed_writes_its_figures_and_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed, "QUICK", TINY)
    monkeypatch.setattr(speed, "MEMORY_OPTIONS", {"plain": {}})
    monkeypatch.setattr(speed, "SHARED_PROCESSES", 2)
    monkeypatch.setattr(sys, "argv", ["speed.py", "--quick"])
    speed.main(["--quick", "--seconds", "0.001", "--threads", "2", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "speed.json").read_text())

    assert results["command"] == "scripts/benchmark speed --quick"
    assert results["machine"]["threads"] == 2
    assert results["machine"]["cpu"]
    assert results["versions"]["torch"] == torch.__version__
    counts = {section: len(results[section]) for section in speed.SECTIONS}
    assert counts == {"layers": 2, "hessian": 2, "options": 1, "memory": 1, "threads": 2, "shared": 1, "growth": 2}

    for row in (*results["layers"], *results["hessian"], *results["growth"]):
        expect_timed(row)
    several = results["layers"][1]
    assert several["flops"] == pytest.approx(3 * measuring.gptq_flops(24, 32))
    assert several["product_flops"] == 3 * measuring.product_flops(24, 32, 32)
    assert [row["dtype"] for row in results["hessian"]] == ["float32", "bfloat16"]
    options = results["options"][0]
    assert [option["name"] for option in options["options"]] == list(speed.OPTIONS)
    for option in options["options"]:
        assert option["relative"] == pytest.approx(option["seconds"] / options["plain_seconds"])
    for row in results["threads"]:
        assert min(row["seconds_1_thread"], row["seconds"], row["product_seconds_1_thread"]) > 0
    shared = results["shared"][0]
    assert len(shared["seconds"]) == len(shared["product_seconds"]) == shared["processes"] == 2
    assert min(*shared["seconds"], *shared["product_seconds"], shared["seconds_1_thread"]) > 0
    # A triangle of floats at the very least.
    memory = results["memory"][0]
    assert 2048**2 / 2 <= memory["extra_floats"] <= memory["bound_floats"] == 1.25 * 2048**2

    text = (tmp_path / "speed.md").read_text()
    assert text == speed.to_markdown(results)
    assert "3 layers of 24 x 32, group 16" in text
    assert f"**{max(shared['seconds']) / shared['seconds_1_thread']:.1f}**" in text
    assert f"**{results['growth'][0]['limit_seconds'] / results['growth'][0]['seconds']:.0%}**" in text
    with Image.open(tmp_path / "growth.png") as plot:
        assert min(plot.size) > 300


def test_against_times_two_clones_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    work = "Hessian, 768 inputs, 64 tokens"
    arguments = [str(ROOT), "--only", work, "--seconds", "0.01", "--threads", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["against", *arguments])
    against.main()
    results = json.loads((tmp_path / "against.json").read_text())
    assert results["commit"] == results["other_commit"]
    (row,) = results["rows"]
    assert row["work"] == work
    assert row["calls"] >= against.LEAST_CALLS
    assert 0 < row["fastest"] <= row["seconds"]
    text = (tmp_path / "against.md").read_text()
    assert f"| {work} |" in text
    assert f"**{row['seconds'] / row['other_seconds']:.2f}**" in text


def test_texts_of_models(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text('def f():\n    """Second\n    text."""\nclass C:\n    """Third."""\n')
    (tmp_path / "a.py").write_text('"""First."""\nx = "no docstring"\n')
    assert docstrings(tmp_path) == "First.\n\nSecond\ntext.\n\nThird.\n"
    assert readable("1 @,@ 000 ( a <unk> ) , well @-@ known .") == "1,000 (a one), well-known."
    assert halves("ab\ncd\nef") == ("ab\ncd", "\nef")


def test_settings_of_texts_are_both_kinds_and_other_groups_of_one() -> None:
    found = texts.settings_of(["plain", "best"], [4], [32, 64])
    assert [(one.scheme, one.group_size, one.kind) for one in found] == [
        ("plain", 64, "encyclopedia"),
        ("best", 64, "encyclopedia"),
        ("plain", 64, "docstrings"),
        ("best", 64, "docstrings"),
        ("plain", 32, "encyclopedia"),
        ("best", 32, "encyclopedia"),
    ]


def test_embeddings_are_compared_with_those_of_the_float_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The keeper of the lighthouse writes down what the sea was like that day .\n" * 200)
    arguments = ["--text", str(text), "--tokens", "512", "--texts", "4", "--bits", "8", "2", "--schemes", "RTN"]
    monkeypatch.setattr(sys, "argv", ["encoder", *arguments, "--work", str(tmp_path), "--output", str(tmp_path)])
    encoder.main()
    eight, two = json.loads((tmp_path / "encoder.json").read_text())["rows"]
    assert 0 < eight["distance"] < 0.001
    assert two["distance"] > 0.1
    assert f"| RTN | {eight['distance']:.4f} ± " in (tmp_path / "encoder.md").read_text()


def test_a_block_is_measured_beside_a_forward_pass(tmp_path: Path) -> None:
    asked = argparse.Namespace(
        work=tmp_path, output=tmp_path / "out", presets=["fast"], tokens=2 * blocks.LENGTH, dtype="float32", peers=None
    )
    asked.add, asked.models = False, ["Llama-2-7B"]
    blocks.Benchmark(asked).measure("Llama-2-7B", {**blocks.QUICK, "hidden_size": 128, "intermediate_size": 256})
    (row,) = json.loads((tmp_path / "out" / "blocks.json").read_text())["rows"]
    assert row["seconds"]["total"] >= sum(row["seconds"][part] for part in blocks.PARTS)
    assert row["forward_pass"] > 0
    line = blocks.line_of(row)
    assert line[:3] == ["Llama-2-7B", "miniquant, fast", "float32"]
    assert float(line[-1]) == pytest.approx(row["seconds"]["total"] * 32 / 3600, abs=0.05)
    asked.add = True
    assert blocks.Benchmark(asked).rows == []  # it is measured again
    asked.models = ["Llama-3-8B"]
    assert blocks.Benchmark(asked).rows == [row]
    asked.tokens = blocks.LENGTH
    with pytest.raises(ValueError, match=f"expected the rows in .* to be of {blocks.LENGTH} tokens"):
        blocks.Benchmark(asked)


def test_gguf_files_have_the_types_of_others(tmp_path: Path) -> None:
    sizes = {**gguf_examples.DECODER, "vocab_size": 300}
    small = gguf_examples.build("LlamaForCausalLM", "LlamaConfig", sizes, bits=5)
    small.model.save_pretrained(tmp_path / "float")
    tokenizer = gguf_examples.byte_level(gguf_examples.PLAIN)
    gguf_examples.save_tokenizer(tokenizer, tmp_path / "float", **gguf_examples.GPT2_TOKENS)
    gguf.write_float(tmp_path / "float", tmp_path / "float.gguf")
    assert set(gguf.layers_of(tmp_path / "float.gguf").values()) == {"F32"}
    assert gguf.bits_per_weight(tmp_path / "float.gguf") == 32
    small.write(tmp_path / "codes.gguf")
    kinds = gguf.layers_of(tmp_path / "codes.gguf")
    assert kinds == dict.fromkeys(small.layers, "Q5_0")
    assert gguf.bits_per_weight(tmp_path / "codes.gguf") == 5.5
    recipe = gguf.recipe_of({**kinds, "model.layers.1.mlp.down_proj": "Q6_K"}, "fast")
    assert recipe.options("model.layers.0.mlp.up_proj").grid == (5, 32, True)
    assert recipe.options("model.layers.1.mlp.down_proj").superblocks == "Q6_K"
    assert {kind: planned_type(kind) for kind in gguf.OPTIONS} == {kind: kind for kind in gguf.OPTIONS}


def planned_type(kind: str) -> str:
    """The type that the options for a type lead to."""
    grid = planned_grid(8, 256, miniquant.LayerOptions(**gguf.OPTIONS[kind]), torch.float16)
    return Gguf().type_of("fc", grid).name


def test_units_keeps_the_figures_of_other_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["units", "--quick", "--seconds", "0.001", "--output", str(tmp_path)])
    units.main()
    path = tmp_path / "units.json"
    (unit,) = measured = json.loads(path.read_text())
    assert unit == torch.ops.miniquant.bfloat16_unit()
    (row,) = measured[unit]["rows"]
    assert min(row["seconds"].values()) > 0
    path.write_text(json.dumps({"other": {**measured[unit], "unit": "other"}}))
    units.main()
    by_unit = json.loads(path.read_text())
    assert set(by_unit) == {unit, "other"}
    text = (tmp_path / "units.md").read_text()
    assert text.index("unit: other") != text.index(f"unit: {unit}")
    (row,) = by_unit[unit]["rows"]
    assert f"**{row['seconds']['bfloat16'] / row['seconds']['float32']:.2f}**" in text


def test_speed_measures_the_tables_that_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed, "QUICK", TINY)
    speed.main(["--quick", "--seconds", "0.001", "--threads", "1", "--only", "hessian", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "speed.json").read_text())
    assert {section for section in speed.SECTIONS if results[section]} == {"hessian"}
    assert not (tmp_path / "growth.png").exists()


def test_score_is_the_error_on_the_inputs() -> None:
    weight, batches = torch.randn(5, 12), torch.randn(2, 20, 12)
    dequantized = weight + 0.1 * torch.randn(5, 12)
    inputs = batches.reshape(-1, 12).double()
    expected = ((weight.double() - dequantized.double()) @ inputs.T).square().sum()
    expected /= (weight.double() @ inputs.T).square().sum()
    score = compare_peers.Score(weight, batches)
    assert score(dequantized) == pytest.approx(float(expected), rel=1e-12)
    assert score(torch.zeros(5, 12)) == 1.0


def test_a_turn_is_one_run_or_as_many_as_fit() -> None:
    for times, fastest, left in ([9.0, 1.0], 9.0, 1), ([0.1, 0.05, 0.2, 0.01], 0.05, 1):
        assert compare_peers.turn(lambda times=times: times.pop(0)) == fastest  # type: ignore[misc]
        assert len(times) == left


def fake_python(folder: Path, body: str) -> Path:
    """A virtual environment whose Python is a shell script."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    return python


def test_compare_peers_writes_its_figures_and_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only our own runner, which needs no peer installed; each option's saved weight is its own."""
    ours = [contender for contender in compare_peers.CONTENDERS if contender.runner == compare_peers.OURS][:2]
    monkeypatch.setattr(compare_peers, "CONTENDERS", ours)
    fake_python(tmp_path / "venv", "exit 1")
    compare_peers.main(
        ["--cases", TINY_CASE, "--repeats", "1", "--peers-venv", str(tmp_path / "venv"), "--output", str(tmp_path)]
    )
    results = json.loads((tmp_path / "peers.json").read_text())
    (case,) = results["cases"]
    assert case["hessian_limit_seconds"] > 0
    assert case["quantize_limit_seconds"] > 0
    assert [line["name"] for line in case["contenders"]] == [contender.name for contender in ours]

    given = compare_peers.case_argument(TINY_CASE)
    weight, batches = measuring.random_weight(48, 64), compare_peers.batches_of(given)
    accumulator = miniquant.HessianAccumulator(64)
    accumulator.update(batches)
    for line in case["contenders"]:
        assert min(line["hessian_seconds"], line["quantize_seconds"]) > 0
        result = miniquant.gptq(weight, accumulator.hessian(), group_size=32, **line["options"])
        dequantized = miniquant.dequantize(result)
        assert line["relative_loss"] == pytest.approx(compare_peers.Score(weight, batches)(dequantized), rel=1e-9)
    assert case["contenders"][0]["relative_loss"] != case["contenders"][1]["relative_loss"]

    text = (tmp_path / "peers.md").read_text()
    assert text == compare_peers.to_markdown(results)
    assert "| miniquant, activation order |" in text
    assert f"| {case['contenders'][1]['relative_loss']:.3e} |" in text


def test_compare_peers_without_their_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare_peers.main(["--quick", "--peers-venv", str(tmp_path)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"no environment for the peers in {tmp_path}: run scripts/benchmark peers" in said
    assert f"benchmarks/peers/setup {tmp_path}" in said


def test_a_runner_that_fails_is_quoted(tmp_path: Path) -> None:
    python = fake_python(tmp_path, "echo 'no module named peer' >&2; exit 3")
    with pytest.raises(compare_peers.RunnerFailedError, match=r"ended with 3:\n  no module named peer"):
        compare_peers.Runner("llm_compressor", python, tmp_path / "problem.pt", 1)


def test_a_problem_is_read_as_it_was_written(tmp_path: Path) -> None:
    problem = Problem(torch.randn(3, 8), torch.randn(2, 5, 8), 4, 8, 0.01, 128)
    problem.save(tmp_path / "problem.pt")
    read = Problem.load(tmp_path / "problem.pt")
    torch.testing.assert_close(read.weight, problem.weight, rtol=0, atol=0)
    torch.testing.assert_close(read.batches, problem.batches, rtol=0, atol=0)
    assert read[2:] == problem[2:]


@pytest.mark.parametrize("text", ["768,768,64", "768,768,64,x", "768,0,64,96", "768,100,64,96"])
def test_cases_that_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare_peers.main(["--cases", text])
    assert f"but got {text}" in capsys.readouterr().err


def test_nothing_of_a_peer_is_imported_outside_its_runner() -> None:
    peers = re.compile(r"^\s*(?:from|import) +(?:llmcompressor|compressed_tensors|neural_compressor)\b", re.MULTILINE)
    files = [path for folder in ("src", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = {path for path in files if peers.search(path.read_text())}
    runners = ROOT / "benchmarks" / "peers"
    assert found == {
        ROOT / "benchmarks" / "models" / "run_llm_compressor.py",
        *(runners / name for name in ("run_llm_compressor.py", "run_neural_compressor.py", "score_layers.py")),
    }


def test_the_peers_are_pinned() -> None:
    files = sorted((ROOT / "benchmarks" / "peers").glob("requirements*.txt"))
    assert len(files) == 2
    for path in files:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert lines
        assert all("==" in line and not line.startswith(("torch=", "nvidia-")) for line in lines)


def test_tables() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
    assert table(["a", "b"], [["1", "2"]], numbers=True) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def test_benchmark_rejects_what_it_does_not_know(run: Any) -> None:
    command = ROOT / "scripts" / "benchmark"
    assert run(command, "--help").startswith("Usage: scripts/benchmark [PART]")
    rejected = subprocess.run([command, "nonsense"], capture_output=True, text=True, check=False)
    assert rejected.returncode == 1
    assert "unknown argument 'nonsense'" in rejected.stderr
