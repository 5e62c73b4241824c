"""The Python package: its exports, the error for a missing library, and the wheel."""

import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import miniquant

OPERATORS = (
    "dequantize",
    "gptq",
    "gptq_reference",
    "gptq_superblocks",
    "hessian_update_",
    "pack_int4",
    "product_update_",
    "quantization_loss",
    "rtn",
    "rtn_superblocks",
    "unpack_int4",
)


def without_package(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Runs code with the package of a folder instead of the installed one."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=path,
        check=False,
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_function_has_the_operators_arguments_and_defaults(name: str) -> None:
    function = inspect.signature(getattr(miniquant, name))
    schema = getattr(torch.ops.miniquant, name).default._schema
    assert [p.name for p in function.parameters.values()] == [a.name for a in schema.arguments]
    for argument in schema.arguments:
        parameter = function.parameters[argument.name]
        assert (parameter.kind is inspect.Parameter.KEYWORD_ONLY) == argument.kwarg_only
        if name == "dequantize" and not argument.kwarg_only:
            continue  # a whole quantized weight stands for all of them
        expected = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        assert parameter.default == expected


@pytest.mark.parametrize(
    "name", [*OPERATORS, "HessianAccumulator", "QuantizedWeight", "GptqResult", "SuperblockWeight", "SuperblockResult"]
)
def test_everything_public_is_documented(name: str) -> None:
    assert name in miniquant.__all__
    assert len(inspect.getdoc(getattr(miniquant, name)) or "") > 40


def test_version_is_that_of_cmake(root: Path) -> None:
    assert version("miniquant").partition("+")[0] == miniquant.__version__
    assert f"project(miniquant VERSION {miniquant.__version__} " in (root / "CMakeLists.txt").read_text()


def test_instruction_set_is_that_of_the_kernels() -> None:
    code = "import miniquant; print(miniquant.instruction_set())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "MINIQUANT_ISA": "baseline"},
        check=True,
    )
    assert run.stdout == "baseline\n"


@pytest.mark.parametrize("forced", ["", "baseline", "avx512_bf16", "amx_bf16"])
def test_the_environment_names_the_unit_for_bfloat16(forced: str) -> None:
    code = "import miniquant; print(miniquant.bfloat16_unit())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "MINIQUANT_ISA": forced},
        check=False,
    )
    if run.returncode != 0:
        assert "MINIQUANT_ISA: expected one of the instruction sets supported here (baseline" in run.stderr
        pytest.skip(f"this CPU has no {forced}")
    units = ("none", "avx512_bf16", "amx_bf16")
    assert run.stdout.strip() in (units if forced == "" else ("none" if forced == "baseline" else forced,))


def test_results_are_named() -> None:
    weight = torch.randn(3, 8)
    rounded = miniquant.rtn(weight, group_size=4)
    assert rounded.codes.shape == (3, 8)
    assert rounded.scales.shape == rounded.zero_points.shape == (3, 2)
    result = miniquant.gptq(weight, torch.eye(8), group_size=4)
    assert torch.equal(result.codes, rounded.codes)
    assert list(result) == [result.codes, result.scales, result.zero_points, result.row_loss]


def test_accumulator_counts_tokens() -> None:
    inputs = torch.randn(6, 5, 8, dtype=torch.float64)
    accumulator = miniquant.HessianAccumulator(8, dtype=torch.float64)
    accumulator.update(inputs[:4])
    accumulator.update(inputs[4])
    accumulator.update(inputs[5, 0])
    for token in inputs[5, 1:]:
        accumulator.update(token)
    assert accumulator.tokens == 30
    flat = inputs.reshape(-1, 8)
    torch.testing.assert_close(accumulator.hessian(), flat.T @ flat / 30, rtol=1e-13, atol=1e-14)


def test_accumulator_gives_a_new_tensor() -> None:
    accumulator = miniquant.HessianAccumulator(4)
    accumulator.update(torch.ones(2, 4))
    accumulator.hessian().zero_()
    assert torch.equal(accumulator.hessian(), torch.ones(4, 4))


def test_accumulator_refuses() -> None:
    with pytest.raises(ValueError, match="at least one token before hessian"):
        miniquant.HessianAccumulator(4).hessian()
    with pytest.raises(ValueError, match="expected in_features to be at least 0, but got -1"):
        miniquant.HessianAccumulator(-1)
    with pytest.raises(TypeError, match=r"expected dtype to be float32 or float64, but got float16"):
        miniquant.HessianAccumulator(4, dtype=torch.float16)
    accumulator = miniquant.HessianAccumulator(4)
    with pytest.raises(ValueError, match="inputs"):
        accumulator.update(torch.ones(2, 5))
    assert accumulator.tokens == 0


def copied_package(root: Path, folder: Path, **build: str) -> Path:
    """The modules in a folder, with a fake library whose build.json has the given versions of torch."""
    package = folder / "miniquant"
    (package / "lib").mkdir(parents=True)
    for name in ("__init__.py", "_interface.py", "_library.py", "_startup.py"):
        (package / name).write_text((root / "src" / "miniquant" / name).read_text())
    (package / "lib" / "libminiquant.so").write_text("no library")
    if build:
        (package / "lib" / "build.json").write_text(json.dumps(build))
    return package


@pytest.mark.parametrize("missing", ["libminiquant.so", "build.json"])
def test_missing_library_says_what_to_run(root: Path, tmp_path: Path, missing: str) -> None:
    package = copied_package(root, tmp_path, torch="2.13.0", torch_min="2.9", torch_below="9.0")
    (package / "lib" / missing).unlink()
    result = without_package("import miniquant", tmp_path)
    assert result.returncode != 0
    assert f"expected {package / 'lib' / missing}" in result.stderr
    assert "scripts/setup" in result.stderr


def test_library_that_does_not_load_says_why(root: Path, tmp_path: Path) -> None:
    copied_package(root, tmp_path, torch="2.13.0", torch_min="2.9", torch_below="9.0")
    result = without_package("import miniquant", tmp_path)
    assert result.returncode != 0
    assert f"built against torch 2.13.0, does not load with torch {torch.__version__}: " in result.stderr
    assert "pip install --no-build-isolation" in result.stderr


@pytest.mark.parametrize(("minimum", "below"), [("1.9", "1.10"), ("1.9", "2.9"), ("9.0", "9.1"), ("2.100", "3.0")])
def test_library_for_another_torch_says_both_versions(root: Path, tmp_path: Path, minimum: str, below: str) -> None:
    copied_package(root, tmp_path, torch=f"{minimum}.1", torch_min=minimum, torch_below=below)
    result = without_package("import miniquant", tmp_path)
    assert result.returncode != 0
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("ImportError: ")]
    assert f"built against torch {minimum}.1 and works with torch>={minimum},<{below}, " in message
    assert f"but torch {torch.__version__} is installed" in message
    assert f"pip install 'torch>={minimum},<{below}'" in message


def test_library_already_loaded_is_not_loaded_twice(root: Path) -> None:
    """A second definition of the namespace would end the process."""
    library = root / "src" / "miniquant" / "lib" / "libminiquant.so"
    code = f"import torch; torch.ops.load_library({str(library)!r}); import miniquant; print(miniquant.rtn)"
    assert without_package(code, root / "src").returncode == 0


def test_range_of_torch_is_stated_once(root: Path) -> None:
    rules = (root / "cmake" / "MiniquantTorch.cmake").read_text()
    minimum, below = (re.search(rf"set\(MINIQUANT_TORCH_{name} (.*)\)", rules) for name in ("MIN", "BELOW"))
    assert minimum
    assert below
    assert f'"torch>={minimum[1]},<{below[1]}"' in (root / "pyproject.toml").read_text()


@pytest.mark.parametrize("version", ["2.9.1", "2.12.0", "2.13.0", "2.14.1", "3.0.0", "2.99.0a0+git0123"])
def test_versions_that_a_binary_works_with_are_the_same_in_cmake_and_setup(
    root: Path, tmp_path: Path, run: Callable[..., str], version: str
) -> None:
    """Also checked with the library that was built: the range contains its own torch."""
    rules = root / "cmake" / "MiniquantTorch.cmake"
    script = tmp_path / "served.cmake"
    script.write_text(
        f'include("{rules}")\nmessage(STATUS "binaries ${{MINIQUANT_TORCH_BINARIES}}")\n'
        f'miniquant_torch_served({version} min below)\nmessage(STATUS "served ${{min}} ${{below}}")\n'
    )
    output = run("cmake", "-P", script)
    setup = runpy.run_path(str(root / "setup.py"), run_name="setup")
    assert f"served {' '.join(setup['served_torch'](version))}\n" in output
    assert "binaries 2." in output


@pytest.mark.slow
def test_wheel_works_outside_the_clone(root: Path, build_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", tmp_path, root),
        env={"MINIQUANT_BUILD_DIR": str(build_dir)},
    )
    (wheel,) = tmp_path.glob("*.whl")
    build = json.loads((root / "src" / "miniquant" / "lib" / "build.json").read_text())
    versioned = f"miniquant-{miniquant.__version__}+torch{build['torch_min']}"
    assert wheel.name.startswith(f"{versioned}-py3-none-linux_")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("miniquant/")}
        metadata = archive.read(f"{versioned}.dist-info/METADATA").decode()
        archive.extract("miniquant/lib/libminiquant.so", tmp_path)
    package = root / "src" / "miniquant"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert {"__init__.py", "_library.py", "gptq.py", "formats/gptq.py"} <= modules
    data = ("py.typed", "recipe.schema.json", "report.schema.json", "data/calibration.txt")
    files = (*data, "lib/build.json", "lib/libminiquant.so")
    assert names == {f"miniquant/{name}" for name in (*modules, *files)}
    assert "Requires-Dist: safetensors>=" in metadata
    assert "Requires-Dist: greenlet>=" in metadata
    assert "Requires-Dist: jsonschema>=" in metadata
    assert re.search(r"Requires-Dist: tomli>=2; python_version < .3\.11.", metadata)
    assert f"Requires-Dist: torch<{build['torch_below']},>={build['torch_min']}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    # The wheel works on any machine: it contains no path of this one.
    dynamic = run("readelf", "--dynamic", tmp_path / "miniquant" / "lib" / "libminiquant.so")
    assert "[$ORIGIN:$ORIGIN/../../torch/lib]" in dynamic

    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')"))
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    # torch and its dependencies come from the environment of the tests. The editable package there is not found: .pth
    # files take effect in a site folder only.
    host = Path(torch.__file__).parents[1]
    code = (
        f"import sys; sys.path.append({str(host)!r}); import torch, miniquant; "
        "print(miniquant.__file__, miniquant.__version__); "
        "print(miniquant.gptq(torch.eye(64), torch.eye(64)).codes.sum().item())"
    )
    output = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert output == [f"{site / 'miniquant' / '__init__.py'} {miniquant.__version__}", str(7 * 64)]
