"""The lab's folder: the driver and the script agree, and the files say what the figures say."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from scripts_as_modules import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "experiments" / "26-gptq-toy"
FILES = {"gptq_toy.py", "results.json", "manifest.json", "loss_curve.png", "README.md"}
MADE_BY = {"plot.py", "report.py", "compare.py", "README.template.md"}

# Computed in float64 by another implementation.
EXPECTED = {
    "normal": {"loss_rtn": 2.76667, "loss_gptq": 0.303847, "loss_ratio": 0.10982, "grid_change_share": 0.16087},
    "cauchy": {"loss_rtn": 105127.2, "loss_gptq": 39725.6, "loss_ratio": 0.37788, "grid_change_share": 0.265},
}
EXPECTED_FRESH = {"fresh_loss_rtn": 2.7304, "fresh_loss_gptq": 5.1410, "fresh_loss_ratio": 1.883}


@pytest.fixture(scope="module")
def lab() -> ModuleType:
    return load("experiments/26-gptq-toy/gptq_toy.py")


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    return importlib.import_module("experiments.26-gptq-toy.report")


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    return importlib.import_module("experiments.26-gptq-toy.plot")


@pytest.fixture(scope="session")
def driver(build_dir: Path) -> Path:
    return Path(os.environ.get("MINIQUANT_DRIVER", build_dir / "bin" / "gptq_toy"))


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    results: dict[str, Any] = json.loads((LAB / "results.json").read_text())
    return results


@pytest.fixture(scope="module")
def sweep(lab: ModuleType, readme: ModuleType, committed: dict[str, Any]) -> Any:
    return readme.measure(lab, lab.Setup.of_results(committed), progress=False)


def runs_of(lab: ModuleType, setup: Any) -> dict[str, Any]:
    return {name: lab.compare(lab.draw(setup, name), setup).figures() for name in lab.DISTRIBUTIONS}


# The lab, then each option once: shapes off the block and the group, a group longer than a block and a row for a group.
SETUPS = {
    "the lab": [],
    "other shape": ["--rows", "33", "--columns", "200", "--tokens", "50", "--fresh-tokens", "64", "--seed", "7"],
    "no fresh inputs": ["--rows", "16", "--columns", "64", "--fresh-tokens", "0"],
    "asymmetric": ["--rows", "48", "--columns", "128", "--asymmetric", "--fresh-tokens", "100"],
    "3 bits, one group per row": ["--rows", "48", "--columns", "100", "--bits", "3", "--group-size", "-1"],
    "activation order": ["--rows", "48", "--columns", "256", "--column-order", "activation", "--ridge", "0.1"],
    "ridge from the data": ["--rows", "150", "--columns", "96", "--ridge", "auto", "--fresh-tokens", "100"],
    "ridge from an odd number of tokens": [
        *("--rows", "20", "--columns", "64", "--tokens", "201", "--ridge", "auto", "--bits", "3", "--asymmetric"),
    ],
    "dynamic scales": ["--rows", "48", "--columns", "256", "--group-scales", "dynamic", "--block-size", "32"],
    "fast": ["--rows", "48", "--columns", "200", "--preset", "fast"],
    "best": ["--rows", "48", "--columns", "200", "--preset", "best"],
    "best, asymmetric": ["--rows", "48", "--columns", "200", "--preset", "best", "--asymmetric"],
    "best, one thing changed": ["--rows", "48", "--columns", "256", "--preset", "best", "--column-order", "natural"],
    "Hessian scales, full range, refined": [
        *("--rows", "48", "--columns", "256", "--scale-method", "hessian", "--full-range", "--refine", "2"),
    ],
}


@pytest.mark.parametrize("options", SETUPS.values(), ids=SETUPS.keys())
def test_driver_and_script_agree(
    options: list[str], driver: Path, lab: ModuleType, tmp_path: Path, run: Callable[..., str]
) -> None:
    run(driver, "--output", tmp_path, *options)
    results = json.loads((tmp_path / "results.json").read_text())
    setup = lab.Setup.of_results(results)
    runs = runs_of(lab, setup)
    assert set(runs) == set(results["runs"])
    # Both call the same operators on the same numbers and do all else in the same order, so nothing may differ.
    assert lab.check(results, runs, tolerance=0.0) == []
    # Every figure of the driver is compared, except the source of its inputs.
    for name, figures in runs.items():
        assert set(results["runs"][name]) - set(figures) == {"input_source", "fresh_input_source"}
    # The same options on the script's command line mean the same setup, and best has the options that are stated.
    parsed = lab.setup_of(lab.parse_arguments(options), lab.Setup())
    assert parsed == setup
    assert all((figures["ridge_choice"] is not None) == ("auto" in options) for figures in runs.values())
    best = setup.with_preset("best")
    assert {option: getattr(best, option) for option in lab.PRESET_OPTIONS} == results["setup"]["best"]


def test_a_ridge_that_is_none_is_named(lab: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("foo", "-1", "nan", "inf"):
        with pytest.raises(SystemExit):
            lab.parse_arguments([f"--ridge={text}"])
        message = f"--ridge: expected a finite number of at least 0, or auto, but got '{text}'"
        assert message in capsys.readouterr().err


def test_script_stands_alone(driver: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    options = ("--rows", "32", "--columns", "64", "--tokens", "16", "--fresh-tokens", "32")
    run(driver, "--output", tmp_path, *options)
    # From elsewhere, and with the setup taken from the file.
    output = run(sys.executable, LAB / "gptq_toy.py", "--check", tmp_path / "results.json", cwd=tmp_path)
    assert "every code and every figure agrees" in output
    assert output.count("tensor([[") == 2
    assert output.count("worst-row perplexity proxy") == 2


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("codes_sha256_gptq", "0" * 64),
        ("codes_sha256_best", "0" * 64),
        ("fresh_loss_best", 3.7),
        ("loss_gptq", 0.30384),
        ("n_grid_changes", 94_000),
        ("worst_row_perplexity_proxy_rtn", math.nan),
        ("fresh_loss_rtn", None),
        ("row_loss_rtn", [1.0]),
        ("top_rows_absolute", []),
        ("ridge", 0.011),
        ("ridge_choice", {"chosen": 0.01}),
    ],
)
def test_check_finds_a_wrong_figure(figure: str, value: object, lab: ModuleType, committed: dict[str, Any]) -> None:
    runs = {"normal": copy.deepcopy(committed["runs"]["normal"])}
    assert lab.check(committed, runs, tolerance=0.0) == []
    runs["normal"][figure] = value
    problems = lab.check(committed, runs, tolerance=1e-6)
    assert problems
    assert all(problem.startswith(f"normal.{figure}") for problem in problems)


def test_check_exits_with_1_where_codes_differ(
    lab: ModuleType, committed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    committed = copy.deepcopy(committed)
    committed["setup"] |= {"rows": 4, "columns": 64, "tokens": 8, "fresh_tokens": 0}
    (tmp_path / "results.json").write_text(json.dumps(committed))
    assert lab.main(["--check", str(tmp_path / "results.json"), "--tolerance", "0.1"]) == 1
    assert "normal.codes_sha256_gptq" in capsys.readouterr().err


def test_folder_holds_the_five_files_and_what_makes_them() -> None:
    assert {path.name for path in LAB.iterdir() if path.name != "__pycache__"} == FILES | MADE_BY


def test_committed_figures_are_the_lab_s(committed: dict[str, Any]) -> None:
    for name, figures in EXPECTED.items():
        found = {figure: committed["runs"][name][figure] for figure in figures}
        assert found == pytest.approx(figures, rel=0.01)
    normal = committed["runs"]["normal"]
    assert {figure: normal[figure] for figure in EXPECTED_FRESH} == pytest.approx(EXPECTED_FRESH, rel=0.01)
    assert normal["loss_ratio"] < 0.7
    assert all(run["best_ratio"] < 0.6 for run in committed["runs"].values())


REPRODUCED = (
    *("loss_rtn", "loss_gptq", "loss_best", "fresh_loss_rtn", "fresh_loss_gptq", "fresh_loss_best", "n_grid_changes"),
)


def test_committed_figures_are_reproduced(lab: ModuleType, committed: dict[str, Any]) -> None:
    # With another instruction set the normal random numbers differ in their last bit, so a few codes may differ.
    for name, figures in runs_of(lab, lab.Setup.of_results(committed)).items():
        for figure in REPRODUCED:
            assert figures[figure] == pytest.approx(committed["runs"][name][figure], rel=0.01), (name, figure)


def test_manifest_names_the_results() -> None:
    manifest = json.loads((LAB / "manifest.json").read_text())
    digest = hashlib.sha256((LAB / "results.json").read_bytes()).hexdigest()
    assert manifest["outputs"]["results.json"] == digest
    assert all(seconds["gptq"] < 30 for seconds in manifest["seconds"].values())


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e\d+)?")


def numbers(text: str) -> list[float]:
    return [float(word.replace(",", "")) for word in NUMBER.findall(text)]


def test_readme_is_what_the_figures_give(
    lab: ModuleType, readme: ModuleType, committed: dict[str, Any], sweep: Any
) -> None:
    manifest = json.loads((LAB / "manifest.json").read_text())
    page = readme.render(lab.Setup.of_results(committed), committed, manifest, sweep)
    found = (LAB / "README.md").read_text()
    # Line breaks depend on the lengths of numbers, and with another instruction set a last digit may differ.
    assert NUMBER.sub("#", " ".join(found.split())) == NUMBER.sub("#", " ".join(page.split()))
    assert numbers(found) == pytest.approx(numbers(page), rel=0.02, abs=0.002)


def test_readme_takes_its_figures_from_the_results(
    lab: ModuleType, readme: ModuleType, committed: dict[str, Any], sweep: Any
) -> None:
    setup = lab.Setup.of_results(committed)
    results = copy.deepcopy(committed)
    results["runs"]["normal"] |= {"loss_gptq": 0.123456, "loss_ratio": 0.0456, "n_grid_changes": 65_432}
    results["runs"]["cauchy"] |= {"loss_best": 2345.6, "best_ratio": 0.0789}
    page = readme.render(setup, results, {"seconds": {"normal": {"gptq": 0.5}}}, sweep)
    assert all(figure in page for figure in ("0.1235", "0.046", "65,432", "2,346", "**0.079**", "less than 1 s"))


@pytest.mark.parametrize(
    "wrong",
    [
        ("normal", "loss_ratio", 0.5),
        ("normal", "fresh_loss_ratio", 0.9),
        ("cauchy", "loss_ratio", 0.05),
        ("normal", "best_ratio", 1.1),
        ("cauchy", "fresh_best_ratio", 1.2),
        ("normal", "fresh_loss_best", 2.5),
    ],
)
def test_readme_refuses_figures_that_contradict_it(
    wrong: tuple[str, str, float], lab: ModuleType, readme: ModuleType, committed: dict[str, Any], sweep: Any
) -> None:
    results = copy.deepcopy(committed)
    run_name, figure, value = wrong
    results["runs"][run_name][figure] = value
    with pytest.raises(readme.UnsupportedError, match="do not support"):
        readme.render(lab.Setup.of_results(results), results, {"seconds": {"normal": {"gptq": 0.5}}}, sweep)


def test_plot_shows_the_committed_results() -> None:
    with Image.open(LAB / "loss_curve.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width >= 1200
        assert image.height >= 800
        digest = hashlib.sha256((LAB / "results.json").read_bytes()).hexdigest()
        assert image.info["Source"] == f"results.json sha256 {digest}"


def test_plot_draws_every_scheme_and_the_same_bytes_twice(plot: ModuleType, tmp_path: Path) -> None:
    pictures = [tmp_path / "first.png", tmp_path / "second.png"]
    for picture in pictures:
        assert plot.main([str(LAB / "results.json"), "--output", str(picture)]) == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    with Image.open(pictures[0]) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
    for colour in (plot.RTN_COLOUR, plot.GPTQ_COLOUR, plot.BEST_COLOUR):
        wanted = np.array([round(255 * part) for part in mpl.colors.to_rgb(colour)])
        # 768 dots or more of each, several pixels a dot.
        assert (np.abs(pixels - wanted).max(axis=2) < 8).sum() > 5000, colour


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with the files of the recorded run."""
    for name in FILES:
        shutil.copy(LAB / name, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    return importlib.import_module("experiments.26-gptq-toy.compare")


def test_a_run_is_compared_with_the_record(
    compare: ModuleType, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([str(copied), str(LAB)]) == 0
    assert capsys.readouterr().out.count(": the same bytes\n") == 4

    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["threads"] += 1
    manifest["git_revision"] = "0" * 40
    (copied / "manifest.json").write_text(json.dumps(manifest))
    page = (copied / "README.md").read_text()
    (copied / "README.md").write_text(page.replace("0.110", "0.111"))
    results = json.loads((copied / "results.json").read_text())
    results["runs"]["normal"]["loss_gptq"] *= 1.001
    results["runs"]["normal"]["codes_sha256_gptq"] = "0" * 64
    (copied / "results.json").write_text(json.dumps(results))
    assert compare.main([str(copied), str(LAB)]) == 0
    said = capsys.readouterr().out
    assert "manifest.json: differs in git_revision, threads\n" in said
    assert "README.md: the same text with other digits\n" in said
    assert "results.json: figures differ by at most 1.0e-03, codes of 1 of 6 quantized layers differ\n" in said


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("normal", "loss_gptq", 0.31), ("cauchy", "n_grid_changes", 1), ("cauchy", "fresh_loss_best", None)],
)
def test_a_figure_that_differs_is_an_error(
    part: str, key: str, value: object, compare: ModuleType, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((copied / "results.json").read_text())
    results["runs"][part][key] = value
    (copied / "results.json").write_text(json.dumps(results))
    assert compare.main([str(copied), str(LAB)]) == 1
    assert f"compare: {part}.{key}: {value} instead of " in capsys.readouterr().err


def test_another_setup_is_an_error(compare: ModuleType, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((copied / "results.json").read_text())
    results["setup"]["bits"] = 3
    (copied / "results.json").write_text(json.dumps(results))
    assert compare.main([str(copied), str(LAB)]) == 1
    assert "compare: the setups differ" in capsys.readouterr().err
