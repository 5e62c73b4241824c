"""A program outside the project finds the installed library, through its headers or through the dispatcher alone."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import miniquant

Checksum = Callable[[torch.Tensor], int]
Problem = tuple[torch.Tensor, torch.Tensor]
pytestmark = pytest.mark.slow


def expected_line(problem: Problem, codes_checksum: Checksum) -> str:
    return f"codes_checksum {codes_checksum(miniquant.gptq(*problem, group_size=32).codes)}"


def test_headers(consumer: Path, run: Callable[..., str], consumer_problem: Problem, codes_checksum: Checksum) -> None:
    output = run(consumer / "consumer_headers")
    assert expected_line(consumer_problem, codes_checksum) in output.splitlines()
    assert "packs 1 counts 1 textbook 1" in output


def test_dispatcher_only(
    consumer: Path, run: Callable[..., str], consumer_problem: Problem, codes_checksum: Checksum
) -> None:
    output = run(consumer / "consumer_dispatcher")
    assert output.splitlines() == [expected_line(consumer_problem, codes_checksum)]


def test_dispatcher_program_names_no_symbol_of_ours(consumer: Path, run: Callable[..., str]) -> None:
    undefined = run("nm", "--dynamic", "--undefined-only", "--demangle", consumer / "consumer_dispatcher")
    assert "c10::Dispatcher" in undefined
    assert "miniquant" not in undefined
    # What keeps the library all the same.
    assert "libminiquant.so" in run("readelf", "--dynamic", consumer / "consumer_dispatcher")


@pytest.mark.parametrize("program", ["consumer_torchscript", "consumer_aoti"])
def test_loaders_say_how_they_are_used(consumer: Path, program: str) -> None:
    result = subprocess.run([consumer / program], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "usage:" in result.stderr


def test_installed_tree(installed_tree: Path) -> None:
    public = {path.name for path in (Path(__file__).parents[2] / "csrc" / "include" / "miniquant").glob("*.h")}
    assert {path.name for path in (installed_tree / "include" / "miniquant").iterdir()} == public
    names = {path.name for path in installed_tree.rglob("*")}
    assert {"libminiquant.so", "miniquantConfig.cmake", "miniquantConfigVersion.cmake", "gptq_toy"} <= names
    # The library for the Python package belongs to a component of its own.
    assert len(list(installed_tree.rglob("libminiquant.so"))) == 1


def test_installed_library_names_torch_and_no_build_folder(installed_tree: Path, run: Callable[..., str]) -> None:
    (library,) = installed_tree.rglob("libminiquant.so")
    match = re.search(r"R(?:UN)?PATH.*\[(.*)\]", run("readelf", "--dynamic", library))
    assert match is not None
    entries = match[1].split(":")
    torch_lib = Path(torch.__file__).resolve().parent / "lib"
    assert entries[0] == "$ORIGIN"
    assert str(torch_lib) in entries
    assert not any("/build/" in entry for entry in entries)


def test_installed_driver_runs(installed_tree: Path, run: Callable[..., str]) -> None:
    assert "--weights" in run(installed_tree / "bin" / "gptq_toy", "--help")


def test_exported_symbols_are_ours(installed_tree: Path, run: Callable[..., str]) -> None:
    """The library exports its public functions and no internal symbols."""
    (library,) = installed_tree.rglob("libminiquant.so")
    symbols = run("nm", "--dynamic", "--defined-only", "--demangle", library)
    assert "miniquant::gptq(" in symbols
    assert "miniquant::algorithms::" not in symbols
    assert "miniquant::kernels::" not in symbols
