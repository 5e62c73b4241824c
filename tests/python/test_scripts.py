"""The commands of scripts/: arguments that they reject, and that the checks they run can fail."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def ended(*command: str | Path, env: dict[str, str] | None = None) -> tuple[int, str]:
    """The exit status of a command, and its whole output."""
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
        check=False,
    )
    return result.returncode, result.stdout


def program(folder: Path, name: str, body: str) -> Path:
    """A shell script of that name, ready to run."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", ["setup", "test", "lab"])
def test_help_and_unknown_argument(root: Path, name: str) -> None:
    status, text = ended(root / "scripts" / name, "--help")
    assert status == 0
    assert text.startswith(f"Usage: scripts/{name}")
    status, text = ended(root / "scripts" / name, "nonsense")
    assert status == 1
    assert "unknown argument 'nonsense'" in text


def test_help_of_quantize_sets_nothing_up(root: Path, tmp_path: Path) -> None:
    status, text = ended(root / "scripts" / "quantize", "--bits", "3", "--help", env={"PYTHON": str(tmp_path / "none")})
    assert status == 0, text
    assert text.startswith("Usage: scripts/quantize")


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("scripts/minilm", "experiments.minilm.layers"),
        ("scripts/benchmark", "benchmarks.speed"),
        ("scripts/benchmark", "benchmarks.peers"),
        ("scripts/benchmark", "benchmarks.quality"),
        ("scripts/benchmark", "benchmarks.models"),
        ("scripts/benchmark", "benchmarks.models.texts"),
        ("scripts/benchmark", "benchmarks.speed.units"),
    ],
)
def test_help_sets_nothing_up_and_names_every_option(root: Path, tmp_path: Path, command: str, module: str) -> None:
    # Setting up would fail with this PYTHON.
    status, text = ended(root / command, "--help", env={"PYTHON": str(tmp_path / "python3")})
    assert status == 0, text
    assert text.startswith(f"Usage: {command}")
    status, help_text = ended(sys.executable, "-m", module, "--help")
    assert status == 0, help_text
    assert set(re.findall(r"--[a-z][a-z-]+", help_text)) <= set(re.findall(r"--[a-z][a-z-]+", text))


def test_setup_refuses_an_old_python(root: Path, tmp_path: Path) -> None:
    old = program(
        tmp_path,
        "python3.8",
        'case "$*" in *base_prefix*) echo "$0" ;; *version_info*) exit 1 ;; --version) echo Python 3.8.20 ;; esac',
    )
    status, text = ended(root / "scripts" / "setup", env={"PYTHON": str(old)})
    assert status == 1
    assert "needs Python 3.10 or newer" in text
    assert "Python 3.8.20" in text


def test_setup_without_python(root: Path, tmp_path: Path) -> None:
    status, text = ended(root / "scripts" / "setup", env={"PYTHON": str(tmp_path / "python3")})
    assert status == 1
    assert "install Python 3.10 or newer" in text


def test_setup_installs_missing_packages_or_names_the_command(root: Path, tmp_path: Path) -> None:
    """Uses stand-ins for dpkg-query, apt-get and sudo: nothing is installed."""
    said = tmp_path / "said"
    bin_dir = tmp_path / "bin"
    program(bin_dir, "dpkg-query", "exit 1")
    program(bin_dir, "apt-get", f'echo "$@" >>{said}; exit 7')
    program(bin_dir, "sudo", "exit 1")
    status, text = ended(
        root / "scripts" / "setup", "--no-build", env={"PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
    )
    assert status != 0
    assert "libcli11-dev libgmock-dev libgtest-dev libssl-dev nlohmann-json3-dev" in text
    if os.geteuid() == 0:
        assert said.read_text() == "update -q\n"
    else:
        assert "sudo apt-get update && sudo apt-get install -y --no-install-recommends libcli11-dev" in text
        assert not said.exists()


def test_symbol_check_finds_a_weak_symbol(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "csrc" / "kernels" / "CMakeFiles" / "miniquant_kernels_avx2.dir"
    folder.mkdir(parents=True)
    source = tmp_path / "kernels_isa.cpp"
    compiler = shutil.which("c++") or "g++"
    check = (sys.executable, root / "scripts" / "check_symbols.py", tmp_path)

    status, text = ended(*check)
    assert status == 1
    assert "no objects of miniquant_kernels_*" in text

    source.write_text("static int twice(int x) { return 2 * x; }\nint four() { return twice(2); }\n")
    assert ended(compiler, "-O0", "-c", source, "-o", folder / "kernels_isa.cpp.o")[0] == 0
    status, text = ended(*check)
    assert (status, "1 objects of kernels define no weak symbol" in text) == (0, True)

    source.write_text("inline int twice(int x) { return 2 * x; }\nint four() { return twice(2); }\n")
    assert ended(compiler, "-O0", "-c", source, "-o", folder / "kernels_isa.cpp.o")[0] == 0
    status, text = ended(*check)
    assert status == 1
    assert "W twice(int)" in text


def test_format_check_finds_a_misformatted_file(root: Path, tmp_path: Path) -> None:
    lint = (sys.executable, root / "scripts" / "lint_cpp.py", "--only", "format")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shutil.copy(root / ".clang-format", tmp_path)
    source = tmp_path / "source.cpp"
    source.write_text("int four() { return 4; }\n")
    assert ended(*lint, source, env={"PATH": path})[0] == 0
    source.write_text("int  four() {return 4;}\n")
    status, text = ended(*lint, source, env={"PATH": path})
    assert status == 1
    assert "code should be clang-formatted" in text


def test_every_requirement_is_pinned(root: Path) -> None:
    for path in (root / "scripts").glob("requirements*.txt"):
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert lines
        for line in lines:
            assert line.count("==") >= 1, f"{path.name}: {line}"
            assert not line.startswith("torch==") or path.name == "requirements-torch.txt"
    assert (root / "scripts" / "requirements-torch.txt").read_text() == "torch==2.13.0\n"


def test_include_check_finds_what_points_up(root: Path, tmp_path: Path) -> None:
    script = tmp_path / "scripts" / "lint_includes.py"
    script.parent.mkdir()
    shutil.copy(root / "scripts" / "lint_includes.py", script)
    header = tmp_path / "csrc" / "kernels" / "kernel.h"
    solver = tmp_path / "csrc" / "algorithms" / "solver.cpp"
    package = tmp_path / "src" / "miniquant"
    for folder in (header.parent, solver.parent, package):
        folder.mkdir(parents=True)
    header.write_text("#include <cstdint>\n")
    solver.write_text('#include <ATen/core/Tensor.h>\n#include "kernels/kernel.h"\n#include "miniquant/options.h"\n')
    (package / "low.py").write_text("import torch\n")
    (package / "high.py").write_text("from miniquant.low import thing\n")
    assert ended(sys.executable, script)[0] == 0

    header.write_text("#include <ATen/core/Tensor.h>\n")
    solver.write_text('#  include "miniquant/gptq.h"\n#include "kernels/kernel-inl.h"\n')
    (package / "low.py").write_text("from miniquant import high\n")
    status, text = ended(sys.executable, script)
    assert status == 1
    assert "kernels/ may not include ATen/core/Tensor.h" in text
    assert "algorithms/ may not include miniquant/gptq.h" in text
    assert "algorithms/ may not include kernels/kernel-inl.h" in text
    assert "modules import each other: " in text
