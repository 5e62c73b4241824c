"""The driver as its users see it: the built program, its files, its exit codes and its documentation."""

import copy
import hashlib
import itertools
import json
import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import miniquant

ROOT = Path(__file__).resolve().parents[2]

# W, X and fresh inputs of the lab in float64, computed apart from this project's code (see docs/driver.md).
LAB = {
    "normal": {
        "loss_rtn": 2.766669,
        "loss_gptq": 0.303847,
        "loss_ratio": 0.10982,
        "grid_change_share": 0.16087,
        "fresh_loss_rtn": 2.7304,
        "fresh_loss_gptq": 5.1410,
        "fresh_loss_ratio": 1.883,
    },
    "cauchy": {
        "loss_rtn": 105127.2,
        "loss_gptq": 39725.6,
        "loss_ratio": 0.37788,
        "grid_change_share": 0.265,
    },
}

SMALL = ["--rows", "48", "--columns", "96", "--tokens", "40", "--fresh-tokens", "100"]

Driver = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def program() -> Path:
    path = Path(os.environ.get("MINIQUANT_DRIVER", ROOT / "build" / "release" / "bin" / "gptq_toy"))
    if not path.is_file():
        pytest.fail(f"{path} does not exist: run scripts/setup, or set MINIQUANT_DRIVER")
    return path.resolve()


@pytest.fixture(scope="session")
def driver(program: Path) -> Driver:
    """Runs the driver; a test that expects another exit code says so."""

    def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [str(program), *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
        )
        assert result.returncode == code, f"{arguments}\n{result.stdout}\n{result.stderr}"
        return result

    return run


@pytest.fixture(scope="session")
def lab(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the driver writes with no option except the folder."""
    folder = tmp_path_factory.mktemp("lab")
    driver("--output", folder)
    return folder


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def validate(folder: Path) -> None:
    for name in ("results", "manifest"):
        schema = load(ROOT / "docs" / f"{name}.schema.json")
        validator = jsonschema.Draft202012Validator
        validator.check_schema(schema)
        validator(schema).validate(load(folder / f"{name}.json"))


def test_lab_figures(lab: Path) -> None:
    runs = load(lab / "results.json")["runs"]
    assert list(runs) == ["normal", "cauchy"]
    for name, expected in LAB.items():
        for figure, value in expected.items():
            assert runs[name][figure] == pytest.approx(value, rel=0.01), f"{name}.{figure}"
    assert runs["normal"]["loss_ratio"] < 0.7, "the lab's stop condition"


def test_lab_figures_belong_together(lab: Path) -> None:
    document = load(lab / "results.json")
    weights = document["setup"]["rows"] * document["setup"]["columns"]
    for run in document["runs"].values():
        for scheme in ("rtn", "gptq", "best"):
            assert sum(run[f"row_loss_{scheme}"]) == pytest.approx(run[f"loss_{scheme}"], rel=1e-12)
            assert len(run[f"row_loss_{scheme}"]) == document["setup"]["rows"]
        assert run["loss_ratio"] == run["loss_gptq"] / run["loss_rtn"]
        assert run["fresh_loss_ratio"] == run["fresh_loss_gptq"] / run["fresh_loss_rtn"]
        assert run["best_ratio"] == run["loss_best"] / run["loss_gptq"]
        assert run["fresh_best_ratio"] == run["fresh_loss_best"] / run["fresh_loss_gptq"]
        assert run["grid_change_share"] == run["n_grid_changes"] / weights
        gains = [a - b for a, b in zip(run["row_loss_rtn"], run["row_loss_gptq"], strict=True)]
        best = sorted(range(len(gains)), key=lambda row: (-gains[row], row))[:10]
        assert [entry["row"] for entry in run["top_rows_absolute"]] == best
        assert [entry["gain"] for entry in run["top_rows_absolute"]] == [gains[row] for row in best]
        relative = [1 - b / a for a, b in zip(run["row_loss_rtn"], run["row_loss_gptq"], strict=True)]
        best = sorted(range(len(relative)), key=lambda row: (-relative[row], row))[:10]
        assert [entry["row"] for entry in run["top_rows_relative"]] == best


def test_lab_inputs_are_the_seeded_generators(lab: Path) -> None:
    document = load(lab / "results.json")

    def digest(tensor: torch.Tensor) -> str:
        return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()

    torch.manual_seed(42)
    assert digest(torch.randn(768, 768) * 0.02) == document["setup"]["weight_source"]["sha256"]
    assert digest(torch.randn(768, 128)) == document["runs"]["normal"]["input_source"]["sha256"]
    assert digest(torch.randn(768, 8192)) == document["runs"]["normal"]["fresh_input_source"]["sha256"]
    torch.manual_seed(42)
    torch.randn(768, 768)
    assert digest(torch.empty(768, 128).cauchy_()) == document["runs"]["cauchy"]["input_source"]["sha256"]
    assert digest(torch.empty(768, 8192).cauchy_()) == document["runs"]["cauchy"]["fresh_input_source"]["sha256"]


def test_lab_files_follow_their_schemas(lab: Path) -> None:
    validate(lab)


def test_schemas_refuse_what_is_missing_or_unknown(lab: Path) -> None:
    schema = load(ROOT / "docs" / "results.schema.json")
    document = load(lab / "results.json")
    document["runs"]["normal"]["seconds"] = 1.0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)
    del document["runs"]["normal"]["seconds"]
    jsonschema.validate(document, schema)
    for missing in ("n_grid_changes", "loss_best", "codes_sha256_best", "fresh_best_ratio", "ridge", "ridge_choice"):
        without = copy.deepcopy(document)
        del without["runs"]["normal"][missing]
        with pytest.raises(jsonschema.ValidationError, match=missing):
            jsonschema.validate(without, schema)
    for missing in ("preset", "scale_method", "best"):
        without = copy.deepcopy(document)
        del without["setup"][missing]
        with pytest.raises(jsonschema.ValidationError, match=missing):
            jsonschema.validate(without, schema)
    for version in (1, 2):
        document["schema_version"] = version
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, schema)


def test_manifest(lab: Path) -> None:
    manifest = load(lab / "manifest.json")
    results = (lab / "results.json").read_bytes()
    assert manifest["outputs"] == {"results.json": hashlib.sha256(results).hexdigest()}
    assert manifest["command"] == ["gptq_toy", "--output", str(lab)]
    assert manifest["seed"] == 42
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert manifest["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    for run in ("normal", "cauchy"):
        stages = ["inputs", "hessian", "rtn", "gptq", "best", "loss", "fresh_hessian", "fresh_loss"]
        assert list(manifest["seconds"][run]) == stages
        assert manifest["seconds"][run]["gptq"] < 30, "the lab's bound for a layer"
    assert manifest["check"] is None


@pytest.mark.parametrize("name", ["baseline", "avx1024"])
def test_the_instruction_set_that_the_environment_names(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("MINIQUANT_ISA", name)
    result = subprocess.run(
        [program, *SMALL, "--output", tmp_path / "out", "--quiet"], capture_output=True, text=True, check=False
    )
    if name == "baseline":
        assert load(tmp_path / "out" / "manifest.json")["instruction_set"] == "baseline"
        validate(tmp_path / "out")
    else:
        assert result.returncode == 2
        assert result.stderr.startswith("gptq_toy: MINIQUANT_ISA: expected ")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--preset", "best", "--asymmetric", "--bits", "3"], ["--ridge", "auto"]])
def test_save_writes_the_layer(driver: Driver, tmp_path: Path, options: list[str]) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, inputs = torch.randn(24, 80, generator=generator) * 0.05, torch.randn(300, 80, generator=generator)
    save_file({"block.fc": weight.bfloat16(), "other": weight}, tmp_path / "w.safetensors")
    save_file({"x": inputs}, tmp_path / "x.safetensors")
    files = ["--weights", tmp_path / "w.safetensors", "--tensor", "block.fc", "--inputs", tmp_path / "x.safetensors"]
    saved = tmp_path / "layers" / "fc.safetensors"
    driver(*files, *options, "--group-size", "32", "--output", tmp_path, "--save", saved)
    validate(tmp_path)
    results, manifest = load(tmp_path / "results.json"), load(tmp_path / "manifest.json")
    assert manifest["outputs"]["fc.safetensors"] == hashlib.sha256(saved.read_bytes()).hexdigest()

    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
        codes, scales, zero_points, row_loss = (
            file.get_tensor(name) for name in ("codes", "scales", "zero_points", "row_loss")
        )
        assert len(file.keys()) == 4
    run = results["runs"]["file"]
    assert hashlib.sha256(codes.numpy().tobytes()).hexdigest() == run["codes_sha256_gptq"]
    assert codes.dtype == zero_points.dtype == torch.int8
    assert (codes.shape, scales.shape, zero_points.shape) == ((24, 80), (24, 3), (24, 3))
    assert scales.dtype == torch.bfloat16
    # The loss is summed from other products than row_loss.
    assert row_loss.double().sum().item() == pytest.approx(run["loss_gptq"], rel=1e-4)

    assert (metadata["format"], metadata["version"], metadata["layer"]) == ("miniquant.layer", "1", "block.fc")
    asymmetric = "--asymmetric" in options
    assert (metadata["bits"], metadata["group_size"]) == ("3" if asymmetric else "4", "32")
    assert (metadata["symmetric"], metadata["full_range"]) == ("false" if asymmetric else "true", "false")
    assert bool(zero_points.any()) == asymmetric
    stated = json.loads(metadata["options"])
    assert stated["ridge"] == run["ridge"]
    # The options are those of the library: they give the layer again.
    accumulator = miniquant.HessianAccumulator(80, halves="auto" in options)
    accumulator.update(inputs)
    again = miniquant.gptq(weight.bfloat16(), accumulator.hessian(), **stated)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scales, scales)


def test_check_says_how_far_the_textbook_form_is(driver: Driver, tmp_path: Path) -> None:
    result = driver("--rows", "96", "--columns", "256", "--tokens", "64", "--check", "--output", tmp_path)
    validate(tmp_path)
    for run in ("normal", "cauchy"):
        assert f"check, {run}: passed" in result.stdout
        check = load(tmp_path / "manifest.json")["check"][run]
        float64, float32, across = check["agreements"]
        assert check["passed"]
        assert float64["compared"] == "float64: gptq, gptq_reference"
        assert float64["differing_codes"] == 0
        assert float64["largest_relative_row_loss_difference"] < 1e-9
        assert float32["compared"] == "float32: gptq, gptq_reference"
        assert across["compared"] == "float32 gptq, float64 gptq_reference"


@pytest.mark.parametrize("options", [[], ["--preset", "fast"], ["--preset", "fast", "--group-size", "-1"]], ids=str)
def test_the_textbook_form_checks_what_it_has(driver: Driver, tmp_path: Path, options: list[str]) -> None:
    result = driver(*SMALL, *options, "--check", "--output", tmp_path)
    assert result.stdout.count(": passed") == 2


@pytest.fixture(scope="session")
def automatic(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The lab with a ridge from the data: the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("automatic")
    return folder, driver("--ridge", "auto", "--check", "--output", folder).stdout


def test_a_ridge_from_the_data_does_the_lab_no_harm(automatic: tuple[Path, str], lab: Path) -> None:
    folder, _ = automatic
    validate(folder)
    document = load(folder / "results.json")
    assert document["setup"]["ridge"] == "auto"
    # 128 tokens of white inputs say nothing about others. The loss is RTN's; the lab's ridge gives 1.88 times that.
    normal = document["runs"]["normal"]
    assert normal["fresh_loss_ratio"] == pytest.approx(1.0, abs=0.01)
    assert load(lab / "results.json")["runs"]["normal"]["fresh_loss_ratio"] > 1.8
    assert normal["ridge_choice"]["reason"] == "none gains on rounding to nearest"
    # A ridge of 0.01 costs 11 times RTN's loss with Cauchy inputs.
    assert document["runs"]["cauchy"]["fresh_loss_ratio"] < 1.01


def test_a_ridge_from_the_data_is_the_library_s(automatic: tuple[Path, str]) -> None:
    folder, _ = automatic
    torch.manual_seed(42)
    weight = torch.randn(768, 768) * 0.02
    accumulator = miniquant.HessianAccumulator(768, halves=True)
    accumulator.update(torch.randn(768, 128).T)
    quantized = miniquant.gptq_auto(weight, accumulator)
    run = load(folder / "results.json")["runs"]["normal"]
    assert run["ridge"] == quantized.ridge
    assert run["ridge_choice"] == {
        "ridges": list(quantized.choice.ridges),
        "held_out": list(quantized.choice.held_out),
        "half_tokens": [64, 64],
        "chosen": quantized.choice.ridge,
        "reason": "none gains on rounding to nearest",
        "failed": [],
    }
    assert run["codes_sha256_gptq"] == hashlib.sha256(quantized.codes.numpy().tobytes()).hexdigest()
    # best has the same ridge, because all options that the choice depends on are the same.
    best = miniquant.gptq(weight, accumulator.hessian(), ridge=quantized.ridge, **miniquant.preset("best"))
    assert run["codes_sha256_best"] == hashlib.sha256(best.codes.numpy().tobytes()).hexdigest()


def test_a_ridge_from_the_data_is_explained_and_checked(automatic: tuple[Path, str]) -> None:
    folder, printed = automatic
    for name, run in load(folder / "results.json")["runs"].items():
        choice = run["ridge_choice"]
        assert choice["held_out"].index(min(choice["held_out"])) == choice["ridges"].index(choice["chosen"])
        assert f"\nridge of '{name}': {choice['chosen']:.4g}" in printed
        assert f"check, {name}: passed" in printed
    assert printed.count("halves of 64 and 64 tokens") == 2


def test_documented_ridge_from_the_data_is_what_is_printed(automatic: tuple[Path, str]) -> None:
    page = (ROOT / "docs" / "driver.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    lines = iter(automatic[1].splitlines())

    def same(shown: str, printed: str) -> bool:
        pairs = list(itertools.zip_longest(shown.split(), printed.split(), fillvalue=""))
        return all(
            a == b or (is_number(a) and is_number(b) and float(a) == pytest.approx(float(b), rel=0.01))
            for a, b in pairs
        )

    # The lines must be printed in this order, with other lines between them.
    for shown in block.splitlines():
        assert any(same(shown, printed) for printed in lines), f"the driver does not print {shown!r} there"


def is_number(word: str) -> bool:
    return re.fullmatch(r"[0-9.]+(e[+-]?[0-9]+)?", word) is not None


def test_a_ridge_from_the_data_does_not_depend_on_threads(
    driver: Driver, automatic: tuple[Path, str], tmp_path: Path
) -> None:
    expected = (automatic[0] / "results.json").read_bytes()
    for threads in ("1", "2"):
        folder = tmp_path / threads
        driver("--ridge", "auto", "--output", folder, "--threads", threads, "--quiet")
        assert (folder / "results.json").read_bytes() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_ridge_from_the_data_of_files(driver: Driver, tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(24, 80, generator=generator) * 0.05).to(dtype)
    mix = torch.randn(8, 80, generator=generator)
    tokens = torch.randn(3000, 8, generator=generator) @ mix + 0.1 * torch.randn(3000, 80, generator=generator)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    save_file({"x": tokens[:401].to(dtype)}, tmp_path / "x.safetensors")
    save_file({"x": tokens[401:].to(dtype)}, tmp_path / "y.safetensors")
    files = ["--weights", "w", "--inputs", "x", "--fresh-inputs", "y"]
    files = [str(tmp_path / f"{name}.safetensors") if index % 2 else name for index, name in enumerate(files)]
    driver(*files, "--ridge", "auto", "--check", "--output", tmp_path)
    validate(tmp_path)
    run = load(tmp_path / "results.json")["runs"]["file"]
    accumulator = miniquant.HessianAccumulator(
        80, torch.float64 if dtype == torch.float64 else torch.float32, halves=True
    )
    accumulator.update(tokens[:401].to(dtype))
    assert run["ridge"] == miniquant.choose_ridge(weight, accumulator).ridge
    assert run["ridge_choice"]["half_tokens"] == [201, 200]
    assert run["ridge_choice"]["reason"] == "least held-out loss"
    # Correlated inputs say something about other inputs.
    assert run["fresh_loss_ratio"] < 0.5
    assert run["fresh_loss_best"] < 0.5 * run["fresh_loss_rtn"]


def gptq_arguments(setup: dict[str, Any]) -> dict[str, Any]:
    """The options in `setup` of results.json that miniquant.gptq takes."""
    terms = ("bits", "group_size", "symmetric", "ridge", "block_size")
    choices = ("column_order", "group_scales", "scale_method", "full_range", "beam_scales", "refine")
    return {name: setup[name] for name in (*terms, *choices)}


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--preset", "fast"],
        ["--preset", "best"],
        ["--preset", "best", "--asymmetric", "--bits", "3"],
        ["--preset", "fast", "--no-full-range", "--refine", "2", "--column-order", "group"],
        ["--scale-method", "hessian", "--full-range", "--ridge", "0.5", "--group-size", "-1"],
        ["--preset", "best", "--scale-method", "absmax", "--beam-scales", "0", "--group-scales", "static"],
    ],
    ids=" ".join,
)
def test_codes_are_the_operators(driver: Driver, tmp_path: Path, options: list[str]) -> None:
    driver(*SMALL, *options, "--distribution", "normal", "--output", tmp_path, "--quiet")
    validate(tmp_path)
    document = load(tmp_path / "results.json")
    setup, run = document["setup"], document["runs"]["normal"]
    torch.manual_seed(42)
    weight = torch.randn(48, 96) * 0.02
    accumulator = miniquant.HessianAccumulator(96)
    accumulator.update(torch.randn(96, 40).T)
    hessian = accumulator.hessian()

    def digest(codes: torch.Tensor) -> str:
        return hashlib.sha256(codes.contiguous().numpy().tobytes()).hexdigest()

    grid = {name: setup[name] for name in ("bits", "group_size", "symmetric")}
    assert run["codes_sha256_rtn"] == digest(miniquant.rtn(weight, **grid).codes)
    assert run["codes_sha256_gptq"] == digest(miniquant.gptq(weight, hessian, **gptq_arguments(setup)).codes)
    best = gptq_arguments(setup) | miniquant.preset("best") | ({} if setup["symmetric"] else {"full_range": False})
    assert setup["best"].items() <= best.items()
    result = miniquant.gptq(weight, hessian, **best)
    assert run["codes_sha256_best"] == digest(result.codes)
    # float32 sums in another order.
    assert run["row_loss_best"] == pytest.approx(result.row_loss.tolist(), rel=1e-4)


def test_results_do_not_depend_on_threads_folder_or_run(driver: Driver, lab: Path, tmp_path: Path) -> None:
    expected = (lab / "results.json").read_bytes()
    for threads in ("1", "2", "2"):
        folder = tmp_path / f"threads {threads}"
        driver("--output", folder, "--threads", threads, "--quiet")
        assert (folder / "results.json").read_bytes() == expected
        assert load(folder / "manifest.json")["threads"] == int(threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_layer_from_safetensors(driver: Driver, tmp_path: Path, dtype: torch.dtype) -> None:
    weight = (torch.randn(24, 80) * 0.05).to(dtype)
    mix = torch.randn(80, 80) / 80**0.5
    inputs = (torch.randn(3, 50, 80) @ mix).to(dtype)
    fresh = (torch.randn(400, 80) @ mix).to(dtype)
    save_file({"fc.weight": weight, "fc.bias": torch.zeros(24)}, tmp_path / "layer.safetensors")
    save_file({"x": inputs}, tmp_path / "inputs.safetensors", metadata={"format": "pt"})
    save_file({"y": fresh}, tmp_path / "fresh.safetensors")
    files = ["--weights", tmp_path / "layer.safetensors", "--inputs", tmp_path / "inputs.safetensors"]
    driver(
        *files,
        "--tensor",
        "fc.weight",
        "--fresh-inputs",
        tmp_path / "fresh.safetensors",
        "--output",
        tmp_path,
        "--check",
    )
    validate(tmp_path)
    document = load(tmp_path / "results.json")
    assert document["setup"]["tokens"] == 150
    assert document["setup"]["fresh_tokens"] == 400
    source = document["setup"]["weight_source"]
    assert source["file"] == "layer.safetensors"
    assert source["dtype"] == {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(dtype)[6:]]
    assert source["sha256"] == hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()

    # RTN and its losses from their definitions, in float64 except for values that are stored in the weight's dtype.
    run = document["runs"]["file"]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    w = weight.to(compute)
    scales = torch.stack([group.abs().amax(1) for group in w.split(64, dim=1)], dim=1).div(7).to(dtype).to(compute)
    scale = scales.repeat_interleave(64, dim=1)[:, :80]
    codes = (w / scale).round().clamp(-7, 7)
    assert run["codes_sha256_rtn"] == hashlib.sha256(codes.to(torch.int8).numpy().tobytes()).hexdigest()
    error = w.double() - codes.double() * scale.double()

    def hessian(tokens: torch.Tensor) -> torch.Tensor:
        flat = tokens.double().reshape(-1, 80)
        return flat.T @ flat / flat.shape[0]

    damped = hessian(inputs) + 0.01 * hessian(inputs).diagonal().mean() * torch.eye(80, dtype=torch.float64)
    rows = (error @ damped * error).sum(1)
    # float32 Hessians of 150 and 400 products; float64 ones are exact to 1e-12.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert run["row_loss_rtn"] == pytest.approx(rows.tolist(), rel=tolerance)
    assert run["fresh_loss_rtn"] == pytest.approx((error @ hessian(fresh) * error).sum().item(), rel=tolerance)
    energy = (w.double() @ damped * w.double()).sum(1)
    assert run["worst_row_perplexity_proxy_rtn"] == pytest.approx((rows / energy).max().exp().item(), rel=tolerance)
    assert run["loss_gptq"] < run["loss_rtn"]
    assert run["fresh_loss_gptq"] < run["fresh_loss_rtn"]
    assert run["loss_best"] < run["loss_gptq"]
    assert run["fresh_loss_best"] < run["fresh_loss_rtn"]


def bad_files(folder: Path) -> dict[str, Path]:
    save_file({"w": torch.randn(8, 16), "b": torch.zeros(8)}, folder / "w.safetensors")
    save_file({"x": torch.randn(20, 16)}, folder / "x.safetensors")
    save_file({"x": torch.randn(20, 15)}, folder / "narrow.safetensors")
    save_file({"x": torch.full((20, 16), float("inf"))}, folder / "infinite.safetensors")
    save_file({"x": torch.ones(20, 16, dtype=torch.int64)}, folder / "integers.safetensors")
    save_file({"x": torch.zeros(20, 16)}, folder / "zeros.safetensors")
    save_file({"x": torch.full((20, 16), 1e30)}, folder / "large.safetensors")
    save_file({"x": torch.full((20, 16), 1e-30)}, folder / "small.safetensors")
    save_file({"w": torch.ones([1] * 65 + [8, 16])}, folder / "deep.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "x.safetensors").read_bytes()[:-1])
    return {path.stem: path for path in folder.glob("*.safetensors")}


FILE_ERRORS: list[tuple[list[str], str]] = [
    (["--weights", "w"], "--weights: expected --inputs with it, but it is missing"),
    (["--weights", "w", "--inputs", "x"], "has more than one tensor, so its name is needed; it has 'b', 'w'"),
    (["--weights", "w", "--tensor", "v", "--inputs", "x"], "has no tensor 'v'; it has 'b', 'w'"),
    (
        ["--weights", "w", "--tensor", "b", "--inputs", "x"],
        "expected a weight [N, K] with N, K >= 1, but got shape [8]",
    ),
    (["--weights", "w", "--tensor", "w", "--inputs", "narrow"], "expected shape [..., 16]"),
    (["--weights", "w", "--tensor", "w", "--inputs", "infinite"], "expected finite values, but 320 of 320 are not"),
    (["--weights", "w", "--tensor", "w", "--inputs", "integers"], "expected dtype F64, F32, F16 or BF16, but got I64"),
    (["--weights", "w", "--tensor", "w", "--inputs", "cut"], "reach past the end of the data"),
    (["--weights", "w", "--tensor", "w", "--inputs", "x", "--fresh-inputs", "narrow"], "--fresh-inputs: "),
    (["--weights", "w", "--tensor", "w", "--inputs", "missing"], "cannot be opened: No such file or directory"),
    (
        ["--weights", "deep", "--inputs", "x"],
        "deep.safetensors: tensor 'w': expected a weight [N, K] with N, K >= 1, but",
    ),
    (
        ["--weights", "w", "--tensor", "w", "--inputs", "large"],
        "--inputs: large.safetensors: tensor 'x': the squares of the inputs are summed in float32: expected at most ",
    ),
    (
        ["--weights", "w", "--tensor", "w", "--inputs", "small"],
        "--inputs: small.safetensors: tensor 'x': the squares of the inputs are summed in float32: expected at least ",
    ),
    (
        ["--weights", "w", "--tensor", "w", "--inputs", "x", "--fresh-inputs", "large"],
        "--fresh-inputs: large.safetensors: tensor 'x': the squares of the inputs are summed in float32: expected at ",
    ),
    (
        ["--weights", "w", "--tensor", "w", "--inputs", "zeros", "--ridge", "auto"],
        "--inputs: zeros.safetensors: tensor 'x': expected a value other than 0 for --ridge auto, but all are 0",
    ),
    (["--weights", "w", "--tensor", "w", "--inputs", "x", "--ridge", "1e40"], "--ridge: expected at most "),
]


@pytest.mark.parametrize(("arguments", "message"), FILE_ERRORS, ids=[message for _, message in FILE_ERRORS])
def test_bad_files_end_with_two_and_write_nothing(
    driver: Driver, tmp_path: Path, arguments: Sequence[str], message: str
) -> None:
    paths = {**bad_files(tmp_path), "missing": tmp_path / "missing.safetensors"}
    takes_file = ("--weights", "--inputs", "--fresh-inputs")
    full = [
        str(paths[argument]) if index and arguments[index - 1] in takes_file else argument
        for index, argument in enumerate(arguments)
    ]
    result = driver(*full, "--output", tmp_path / "out", code=2)
    assert message in result.stderr
    assert result.stderr.startswith("gptq_toy: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "1"], "--bits: expected an integer from 2 to 8, but got '1'"),
        (["--group-size", "0"], "--group-size: expected a positive integer, or -1 for one group per row, but got '0'"),
        (["--ridge", "-1"], "--ridge: expected a finite number of at least 0, or auto, but got '-1'"),
        (["--ridge", "foo"], "--ridge: expected a finite number of at least 0, or auto, but got 'foo'"),
        (["--ridge", "auto", "--tokens", "1"], "--ridge: expected at least 2 calibration tokens with auto"),
        (["--colunm-order", "natural"], "--colunm-order"),
        (
            ["--group-scales", "dynamic", "--column-order", "activation"],
            "--group-scales: expected static with --column-order activation, but got dynamic",
        ),
        (
            ["--preset", "best", "--group-scales", "static"],
            "absmax, mse or hessian with --group-scales static, but got loss (of --preset best)",
        ),
        (
            ["--asymmetric", "--full-range"],
            "--full-range: not allowed with --asymmetric, because an asymmetric grid already uses every code",
        ),
        (["--preset", "best", "--check"], "--check: expected --scale-method absmax, mse or hessian, which"),
    ],
)
def test_bad_options_end_with_two(driver: Driver, tmp_path: Path, arguments: Sequence[str], message: str) -> None:
    result = driver(*arguments, "--output", tmp_path / "out", code=2)
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_singular_hessian_is_an_error_with_advice(driver: Driver, tmp_path: Path) -> None:
    result = driver(*SMALL, "--ridge", "0", "--output", tmp_path / "out", code=1)
    assert "ridge" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_failed_run_keeps_what_was_there(driver: Driver, tmp_path: Path) -> None:
    driver(*SMALL, "--output", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"results.json", "manifest.json"}
    driver(*SMALL, "--ridge", "0", "--output", tmp_path, code=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_killed_run_leaves_whole_files_or_none(program: Path, driver: Driver, tmp_path: Path) -> None:
    driver(*SMALL, "--output", tmp_path / "whole", "--quiet")
    expected = (tmp_path / "whole" / "results.json").read_bytes()
    start = time.monotonic()
    driver(*SMALL, "--output", tmp_path / "timed", "--quiet")
    duration = time.monotonic() - start
    steps = 8
    for step in range(1, steps + 1):
        folder = tmp_path / str(step)
        process = subprocess.Popen([str(program), *SMALL, "--output", str(folder), "--quiet"])
        time.sleep(duration * step / steps)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (folder / "results.json").exists():
            assert (folder / "results.json").read_bytes() == expected
        if (folder / "manifest.json").exists():
            assert load(folder / "manifest.json")["outputs"]["results.json"] == hashlib.sha256(expected).hexdigest()


def test_a_pipe_gets_the_table_and_no_progress(driver: Driver, tmp_path: Path) -> None:
    result = driver(*SMALL, "--output", tmp_path)
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    for text in ("calibration loss", "fresh loss", "worst row ppl proxy", "codes changed", "largest gain, relative"):
        assert text in result.stdout
    shown = re.search(r"^calibration loss +(\S+)", result.stdout, re.MULTILINE)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(load(tmp_path / "results.json")["runs"]["normal"]["loss_rtn"], rel=1e-5)


def test_a_reader_that_goes_away_does_not_cost_the_files(program: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        subprocess.run([str(program), *SMALL, "--output", str(tmp_path)], stdout=pipe, check=False, timeout=300)
    validate(tmp_path)


def test_a_terminal_gets_progress(program: Path, tmp_path: Path) -> None:
    terminal, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    command = [str(program), *SMALL, "--output", str(tmp_path)]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=side, env=environment, text=True, check=True, timeout=300
    )
    os.close(side)
    shown = b""
    try:
        while chunk := os.read(terminal, 65536):
            shown += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    finally:
        os.close(terminal)
    assert b"0/16  normal: inputs" in shown
    assert b"15/16  cauchy: fresh_loss" in shown
    assert shown.endswith(b"\r\x1b[K")
    assert "\x1b" not in result.stdout


def test_documented_help_is_the_programs(driver: Driver) -> None:
    page = (ROOT / "docs" / "driver.md").read_text(encoding="utf-8")
    names = set(re.findall(r"--[a-z][a-z-]+", driver("--help").stdout)) - {"--help"}
    missing = sorted(name for name in names if f"`{name}" not in page)
    assert not missing, f"docs/driver.md says nothing about {missing}"
    documented = set(re.findall(r"`(--[a-z][a-z-]+)", page))
    assert documented <= names, f"docs/driver.md has options that do not exist: {sorted(documented - names)}"


def test_documented_definitions_are_those_of_the_results(lab: Path) -> None:
    page = " ".join((ROOT / "docs" / "driver.md").read_text(encoding="utf-8").split())
    for name, definition in load(lab / "results.json")["definitions"].items():
        assert definition in page, f"docs/driver.md does not have the definition of {name} in results.json"


def test_version(driver: Driver) -> None:
    assert re.fullmatch(r"gptq_toy \d+\.\d+\.\d+ \(torch 2\.13\.\d+.*\)\n", driver("--version").stdout)
