"""Layers of the MiniLM encoder: extraction, and the gain of GPTQ on real calibration and fresh inputs."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "experiments.minilm.layers")
LAYER = "encoder.layer.0.intermediate.dense"
TOKENS = 2048


@pytest.fixture(scope="module")
def minilm() -> ModuleType:
    return importlib.import_module("experiments.minilm.layers")


@pytest.fixture(scope="session")
def driver(build_dir: Path) -> Path:
    return Path(os.environ.get("MINIQUANT_DRIVER", build_dir / "bin" / "gptq_toy"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, driver: Path, run: Callable[..., str]) -> Path:
    """Two layers, extracted and compared by the script as a user runs it."""
    output = tmp_path_factory.mktemp("minilm")
    counts = ("--tokens", str(TOKENS), "--fresh-tokens", str(TOKENS - 1))
    layers = ("--layer", LAYER, "--layer", "encoder.layer.5.output.dense")
    text = run(*COMMAND, *layers, *counts, "--output", output, "--driver", driver, cwd=ROOT)
    (output / "output.txt").write_text(text)
    return output


def test_files_hold_the_layer(folder: Path, minilm: ModuleType) -> None:
    weights = load_file(folder / LAYER / "weight.safetensors")
    assert list(weights) == [f"{LAYER}.weight"]
    with safe_open(minilm.model_folder() / "model.safetensors", "pt") as model:
        torch.testing.assert_close(weights[f"{LAYER}.weight"], model.get_tensor(f"{LAYER}.weight"), rtol=0, atol=0)
    rows, columns = weights[f"{LAYER}.weight"].shape
    assert (rows, columns) == (1536, 384)
    calibration = load_file(folder / LAYER / "calibration.safetensors")["inputs"]
    fresh = load_file(folder / LAYER / "fresh.safetensors")["inputs"]
    assert calibration.shape == (TOKENS, columns)
    assert fresh.shape == (TOKENS - 1, columns)
    assert calibration.dtype == fresh.dtype == torch.float32
    # The tokens are of different texts, so the two share no row, except for [CLS] and the like, which start every text.
    assert torch.isfinite(calibration).all()
    assert (
        len({row.numpy().tobytes() for row in calibration} & {row.numpy().tobytes() for row in fresh}) <= TOKENS // 50
    )


@pytest.mark.parametrize("layer", [LAYER, "encoder.layer.5.output.dense"])
def test_gptq_gains_on_calibration_and_on_fresh_inputs(folder: Path, layer: str) -> None:
    run: dict[str, Any] = json.loads((folder / layer / "results.json").read_text())["runs"]["file"]
    assert run["loss_gptq"] < 0.6 * run["loss_rtn"]
    assert run["fresh_loss_gptq"] < 0.8 * run["fresh_loss_rtn"]
    assert run["loss_best"] < 0.8 * run["loss_gptq"]
    assert run["fresh_loss_best"] < 0.8 * run["fresh_loss_gptq"]


def test_output_names_layers_and_ratios(folder: Path) -> None:
    text = (folder / "output.txt").read_text()
    run = json.loads((folder / LAYER / "results.json").read_text())["runs"]["file"]
    line = text[text.index("layer  ") :].splitlines()[1]
    assert line.startswith(LAYER)
    ratios = [run[key] for key in ("loss_ratio", "fresh_loss_ratio", "best_ratio", "fresh_best_ratio")]
    assert line.split()[4:8] == [f"{ratio:.3f}" for ratio in ratios]


def test_kept_output_is_that_of_the_kept_results(minilm: ModuleType) -> None:
    layers = [f"encoder.layer.0.{kind}" for kind in minilm.KINDS]
    folders = [minilm.RECORDS / layer for layer in layers]
    text = (minilm.RECORDS / "output.txt").read_text()
    assert text.endswith(minilm.summary(layers, folders) + "\n")
    for folder in folders:
        run = json.loads((folder / "results.json").read_text())["runs"]["file"]
        assert run["loss_ratio"] < 0.6, folder.name
        assert run["fresh_loss_ratio"] < 0.7, folder.name
        assert max(run["best_ratio"], run["fresh_best_ratio"]) < 0.7, folder.name


def test_recorded_inputs_are_what_the_layer_saw(minilm: ModuleType) -> None:
    encoder = minilm.Encoder()
    linear = encoder.linear(LAYER)
    outputs: list[torch.Tensor] = []
    hook = linear.register_forward_hook(lambda _module, _arguments, output: outputs.append(output.detach()))
    recorded = encoder.inputs([LAYER], ["A first text, short.", "And a second one."], 10, "test")[LAYER]
    hook.remove()
    assert recorded.shape == (10, linear.in_features)
    with torch.inference_mode():
        again = linear(recorded)
    torch.testing.assert_close(
        again, torch.cat([output.flatten(0, 1) for output in outputs])[:10], rtol=1e-5, atol=1e-5
    )


def test_texts_are_disjoint_and_in_a_fixed_order(minilm: ModuleType) -> None:
    used: set[str] = set()
    calibration = list(itertools.islice(minilm.passages(0, used), 100))
    fresh = list(itertools.islice(minilm.passages(1, used), 100))
    assert len({*calibration, *fresh}) == 200
    assert list(itertools.islice(minilm.passages(0, set()), 100)) == calibration
    assert all(len(text) >= minilm.SHORTEST_DOCSTRING for text in (*calibration, *fresh))


def test_unknown_layer_is_named_with_those_there_are(minilm: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"encoder\.layer\.9") as error:
        minilm.main(["--layer", "encoder.layer.9.output.dense", "--extract-only", "--output", str(tmp_path / "out")])
    assert LAYER in str(error.value)
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_there_are(minilm: ModuleType) -> None:
    with pytest.raises(SystemExit, match="expected at most 8 tokens"):
        minilm.Encoder().inputs([LAYER], ["A short text, five."], 1000, "test")
