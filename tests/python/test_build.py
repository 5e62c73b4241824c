"""Configuring and packaging the project: with any build of torch, without a CUDA toolkit; failures give one reason."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# What the CMake package of a CUDA build says on a machine without the toolkit.
CUDA_COMPLAINT = "Your installed Caffe2 version uses CUDA but I cannot find the CUDA libraries"


def make_torch(folder: Path, version: str | None = None) -> Path:
    """A LibTorch like the installed one, whose CMake package insists on CUDA; the folder of that package."""
    installed = Path(torch.__file__).resolve().parent
    package = folder / "share" / "cmake" / "Torch"
    package.mkdir(parents=True)
    for name in ("include", "lib"):
        (folder / name).symlink_to(installed / name)
    (package / "TorchConfig.cmake").write_text(f'message(FATAL_ERROR "{CUDA_COMPLAINT}")\n')
    text = (installed / "share" / "cmake" / "Torch" / "TorchConfigVersion.cmake").read_text()
    if version is not None:
        text = re.sub(r'(PACKAGE_VERSION )"[^"]*"', rf'\1"{version}"', text, count=1)
    (package / "TorchConfigVersion.cmake").write_text(text)
    return package


def configure(source: Path, build: Path, *definitions: str) -> tuple[int, str]:
    """The exit status of a configuration and its output joined into one line, because CMake wraps lines."""
    result = subprocess.run(
        ["cmake", "-S", source, "-B", build, "-G", "Ninja", *definitions],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.returncode, " ".join(result.stdout.split())


def configure_library(root: Path, build: Path, torch_dir: Path) -> tuple[int, str]:
    return configure(root, build, f"-DTorch_DIR={torch_dir}", "-DMINIQUANT_BUILD_DRIVER=OFF")


def test_library_is_configured_without_a_cuda_toolkit(root: Path, tmp_path: Path) -> None:
    package = make_torch(tmp_path / "a torch")
    status, text = configure_library(root, tmp_path / "build", package)
    assert status == 0, text
    assert CUDA_COMPLAINT not in text
    assert f"LibTorch {torch.__version__.partition('+')[0]}: {tmp_path / 'a torch'}" in text


@pytest.mark.parametrize(("version", "refused"), [("2.6.0", True), ("2.8.1", True), ("2.99.0", False)])
def test_configuration_names_the_version_that_is_not_supported(
    root: Path, tmp_path: Path, version: str, *, refused: bool
) -> None:
    status, text = configure_library(root, tmp_path / "build", make_torch(tmp_path / "torch", version))
    assert (status != 0) == refused, text
    if refused:
        assert f"miniquant needs LibTorch 2.9 or newer, and that of {tmp_path / 'torch'}" in text
        assert f"is {version}" in text
    else:
        assert "miniquant is tested with LibTorch from 2.9 to before" in text


def test_configuration_without_torch_says_what_to_give(root: Path, tmp_path: Path) -> None:
    status, text = configure_library(root, tmp_path / "build", tmp_path)
    assert status != 0
    assert f"Torch_DIR is {tmp_path}, which holds no TorchConfigVersion.cmake" in text


@pytest.mark.slow
def test_consumer_is_built_without_a_cuda_toolkit(
    root: Path, installed_tree: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    """The program that calls the dispatcher compiles in seconds; the others differ only in their sources."""
    package, build = make_torch(tmp_path / "torch"), tmp_path / "build"
    definitions = (f"-DCMAKE_PREFIX_PATH={installed_tree}", f"-DTorch_DIR={package}")
    status, text = configure(root / "tests" / "consumer", build, *definitions)
    assert status == 0, text
    run("cmake", "--build", build, "--target", "consumer_dispatcher")
    assert "codes_checksum " in run(build / "consumer_dispatcher")
    # An AOTInductor package names libtorch.so, of which the program itself uses no symbol.
    assert "libtorch.so" in run("readelf", "--dynamic", build / "consumer_dispatcher")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch's own package for CMake needs its CUDA toolkit")
def test_consumer_may_have_found_torch_itself(root: Path, installed_tree: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(root / "tests" / "consumer", source)
    lists = source / "CMakeLists.txt"
    lists.write_text(
        lists.read_text().replace("find_package(miniquant", "find_package(Torch REQUIRED)\nfind_package(miniquant")
    )
    status, text = configure(
        source, tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed_tree};{torch.utils.cmake_prefix_path}"
    )
    assert status == 0, text


def test_consumer_with_another_torch_is_told_both_versions(root: Path, installed_tree: Path, tmp_path: Path) -> None:
    package = make_torch(tmp_path / "torch", "2.10.0")
    status, text = configure(
        root / "tests" / "consumer",
        tmp_path / "build",
        f"-DCMAKE_PREFIX_PATH={installed_tree}",
        f"-DTorch_DIR={package}",
    )
    assert status != 0
    assert f"built against LibTorch {torch.__version__.partition('+')[0]} and works with" in text
    assert "is 2.10.0: build miniquant again with -DTorch_DIR=" in text


def setup_functions(root: Path) -> dict[str, Any]:
    """The functions of setup.py."""
    return runpy.run_path(str(root / "setup.py"), run_name="setup")


def test_folder_whose_configuration_failed_is_not_taken(root: Path, tmp_path: Path) -> None:
    """CMake leaves CMakeCache.txt behind; building there ends with: ninja: error: loading 'build.ninja'."""
    is_ours, package = setup_functions(root)["is_ours"], make_torch(tmp_path / "torch")
    build = tmp_path / "build"
    definitions = (f"-DTorch_DIR={package}", "-DMINIQUANT_BUILD_DRIVER=OFF", "-DCMAKE_BUILD_TYPE=Release")
    version = package / "TorchConfigVersion.cmake"
    good = version.read_text()
    version.write_text('set(PACKAGE_VERSION "2.6.0")\n')
    status, _ = configure(root, build, *definitions)
    assert status != 0
    assert f"Torch_DIR:UNINITIALIZED={package}" in (build / "CMakeCache.txt").read_text()
    assert not is_ours(build, package)

    version.write_text(good)
    status, text = configure(root, build, *definitions)
    assert status == 0, text
    assert is_ours(build, package)
    assert not is_ours(build, package.parent)


def test_build_that_fails_ends_with_the_reason_alone(root: Path, tmp_path: Path) -> None:
    package = make_torch(tmp_path / "torch", "2.6.0")
    code = (
        "import runpy, sys, pathlib; s = runpy.run_path(sys.argv[1], run_name='setup'); "
        "s['run_cmake']('configure it', '-S', str(pathlib.Path(sys.argv[1]).parent), '-B', *sys.argv[2:])"
    )
    command = (sys.executable, "-c", code, root / "setup.py", tmp_path / "build", f"-DTorch_DIR={package}")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: CMake could not configure it:\n  CMake Error at ")
    assert "is 2.6.0" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) < 12


def test_wheel_without_torch_says_what_to_type(root: Path, tmp_path: Path) -> None:
    """With a Python that has setuptools and no torch, as pip runs setup.py with --no-build-isolation."""
    import setuptools  # noqa: PLC0415  (its folder is what is wanted)

    tools = tmp_path / "tools"
    tools.mkdir()
    site = Path(setuptools.__file__).parents[1]
    for path in site.iterdir():
        if path.name.split("-")[0] in {"setuptools", "_distutils_hack", "pkg_resources", "packaging"}:
            (tools / path.name).symlink_to(path)
    command = (sys.executable, "-S", "setup.py", "dist_info", "--output-dir", tmp_path / "metadata")
    result = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tools)}, check=False
    )
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "this Python has none: type `pip install 'torch>=2.9,<" in line
    assert "Traceback" not in result.stderr


def test_source_distribution_holds_what_the_build_needs(root: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """Every file of the source that git knows, and it is configured from a folder with a space in its name."""
    code = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, tmp_path, cwd=root)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert re.fullmatch(r"miniquant-\d+\.\d+\.\d+\.tar\.gz", archive.name)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "source tree", filter="data")
    (source,) = (tmp_path / "source tree").iterdir()
    held = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    wanted = (
        "csrc",
        "cmake",
        "src",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CMakeLists.txt",
    )
    tracked = run("git", "ls-files", "--", *wanted, cwd=root).splitlines()
    assert set(tracked) <= held
    minimum, below = setup_functions(root)["supported_torch"]().removeprefix("torch").split(",")
    assert f"Requires-Dist: torch{below},{minimum}\n" in (source / "PKG-INFO").read_text()
    status, text = configure_library(source, tmp_path / "build", Path(torch.utils.cmake_prefix_path, "Torch"))
    assert status == 0, text
