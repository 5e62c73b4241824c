"""The Python package: what it exports, how it says that its library is missing, and the wheel."""

import inspect
import os
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
    "hessian_update_",
    "pack_int4",
    "quantization_loss",
    "rtn",
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
        expected = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        assert parameter.default == expected


@pytest.mark.parametrize("name", [*OPERATORS, "HessianAccumulator", "QuantizedWeight", "GptqResult"])
def test_everything_public_is_documented(name: str) -> None:
    assert name in miniquant.__all__
    assert len(inspect.getdoc(getattr(miniquant, name)) or "") > 40


def test_version_is_that_of_cmake(root: Path) -> None:
    assert miniquant.__version__ == version("miniquant")
    assert f"project(miniquant VERSION {miniquant.__version__} " in (root / "CMakeLists.txt").read_text()


def test_results_are_named() -> None:
    weight = torch.randn(3, 8)
    rounded = miniquant.rtn(weight, group_size=4)
    assert rounded.codes.shape == (3, 8)
    assert rounded.scales.shape == rounded.zero_points.shape == (3, 2)
    result = miniquant.gptq(weight, torch.eye(8), group_size=4)
    assert torch.equal(result.codes, rounded.codes)
    assert result._fields == (*rounded._fields, "row_loss")


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
    with pytest.raises(TypeError, match=r"expected dtype to be float32 or float64, but got torch\.float16"):
        miniquant.HessianAccumulator(4, dtype=torch.float16)
    accumulator = miniquant.HessianAccumulator(4)
    with pytest.raises(ValueError, match="inputs"):
        accumulator.update(torch.ones(2, 5))
    assert accumulator.tokens == 0


def test_missing_library_says_what_to_run(root: Path, tmp_path: Path) -> None:
    package = tmp_path / "miniquant"
    package.mkdir()
    (package / "__init__.py").write_text((root / "src" / "miniquant" / "__init__.py").read_text())
    result = without_package("import miniquant", tmp_path)
    assert result.returncode != 0
    assert f"expected {package / 'lib' / 'libminiquant.so'}" in result.stderr
    assert "scripts/setup" in result.stderr


def test_library_that_does_not_load_says_why(root: Path, tmp_path: Path) -> None:
    package = tmp_path / "miniquant"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text((root / "src" / "miniquant" / "__init__.py").read_text())
    (package / "lib" / "libminiquant.so").write_text("no library")
    result = without_package("import miniquant", tmp_path)
    assert result.returncode != 0
    assert f"does not load with torch {torch.__version__}" in result.stderr


def test_library_already_loaded_is_not_loaded_twice(root: Path) -> None:
    """A second definition of the namespace would end the process."""
    library = root / "src" / "miniquant" / "lib" / "libminiquant.so"
    code = f"import torch; torch.ops.load_library({str(library)!r}); import miniquant; print(miniquant.rtn)"
    assert without_package(code, root / "src").returncode == 0


@pytest.mark.slow
def test_wheel_works_outside_the_clone(root: Path, build_dir: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", tmp_path, root),
        env={"MINIQUANT_BUILD_DIR": str(build_dir)},
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"miniquant-{miniquant.__version__}-py3-none-linux_")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("miniquant/")}
        metadata = archive.read(f"miniquant-{miniquant.__version__}.dist-info/METADATA").decode()
        archive.extract("miniquant/lib/libminiquant.so", tmp_path)
    modules = {path.name for path in (root / "src" / "miniquant").glob("*.py")}
    assert {"__init__.py", "gptq.py", "presets.py", "ridge.py"} <= modules
    assert names == {f"miniquant/{name}" for name in (*modules, "py.typed", "lib/libminiquant.so")}
    assert "Requires-Dist: torch==2.13.0" in metadata
    # The wheel holds on any machine: no folder of this one in it.
    dynamic = run("readelf", "--dynamic", tmp_path / "miniquant" / "lib" / "libminiquant.so")
    assert "[$ORIGIN:$ORIGIN/../../torch/lib]" in dynamic

    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')"))
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    # torch and what it needs come from the environment of the tests; the editable package there is not reached, as
    # .pth files take effect in a site folder only.
    host = Path(torch.__file__).parents[1]
    code = (
        f"import sys; sys.path.append({str(host)!r}); import torch, miniquant; "
        "print(miniquant.__file__, miniquant.__version__); "
        "print(miniquant.gptq(torch.eye(64), torch.eye(64)).codes.sum().item())"
    )
    output = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert output == [f"{site / 'miniquant' / '__init__.py'} {miniquant.__version__}", str(7 * 64)]
