#!/usr/bin/env python3
"""Builds the wheel for several versions of torch and runs the operator tests with each, in environments of their own.

    scripts/torch_matrix.py                          the oldest torch that is supported, the pinned and the newest
    scripts/torch_matrix.py 2.9.1 2.14.1@python3.13  these, the second with another Python
    scripts/torch_matrix.py --installed              the torch of the Python that runs this script, without a download

Each row is an environment with one torch. The first row makes a source distribution. A row builds its wheel from it,
unless a wheel of an earlier row works with its torch; then that wheel is installed. The operator tests
(tests/python/test_ops_*.py and test_errors.py) run with the installed wheel. The table of results is printed, and
written to the folder --output as torch_matrix.md beside the wheels. torch comes from the index that pip is configured
to use; a row with the default build of torch takes about 7 GB of disk while it runs. The exit status is 1 if a row
fails.
"""

import argparse
import datetime as dt
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUPPORTED = ("2.9.1", "2.13.0", "2.14.1", "2.15.0")
TESTS = ("test_ops_*.py", "test_errors.py")
# An environment of --installed takes these from the environment that it is based on.
TEST_REQUIREMENTS = ("hypothesis", "numpy", "pytest", "safetensors")
TABLE_HEAD = """\
| torch | Python | wheel | operator tests | date |
|---|---|---|---|---|
"""


class RowError(Exception):
    """A command of a row failed; the message is the end of its output."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    torch: str  # a version, or "installed"
    python: str  # a command

    @classmethod
    def parse(cls, text: str) -> "Row":
        """VERSION or VERSION@PYTHON."""
        version, _, python = text.partition("@")
        if not re.fullmatch(r"\d+\.\d+\.\d+(\+\w+)?", version):
            raise argparse.ArgumentTypeError(f"expected VERSION or VERSION@PYTHON, such as 2.13.0, but got {text!r}")
        return cls(version, python or sys.executable)


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """The standard output of a command.

    Raises:
        RowError: The command failed.
    """
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if result.returncode != 0:
        tail = "\n".join(result.stdout.splitlines()[-40:])
        raise RowError(f"{' '.join(map(str, command))} ended with {result.returncode}\n{tail}")
    return result.stdout


def pins(names: tuple[str, ...]) -> list[str]:
    """The lines of scripts/requirements.txt for these packages, with their markers."""
    lines = (ROOT / "scripts" / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line.partition("==")[0] in names]


def make_environment(row: Row, folder: Path) -> Path:
    """An environment with the row's torch and what building and testing ask for; its Python."""
    python = folder / "bin" / "python"
    if row.torch == "installed":
        run(row.python, "-m", "venv", "--without-pip", folder)
        # Below the environment's own packages, and without the .pth files of the folder: no editable package comes in.
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')"))
        (site / "host.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return python
    run(row.python, "-m", "venv", folder)
    pip = (python, "-m", "pip", "install", "--quiet")
    run(*pip, "-r", ROOT / "scripts" / "requirements-build.txt", "cmake", "ninja")
    requirements = folder / "requirements.txt"
    requirements.write_text("\n".join([f"torch=={row.torch}", *pins(TEST_REQUIREMENTS)]) + "\n")
    run(*pip, "-r", requirements)
    return python


def make_source(python: Path, folder: Path) -> Path:
    """The unpacked source distribution, in a folder with a space in its name."""
    run(python, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "source tree", filter="data")
    (source,) = (folder / "source tree").iterdir()
    (source / "PKG-INFO").unlink()  # with which a wheel's version would be that of the distribution, without the torch
    return source


def requirement(wheel: Path) -> str:
    """The torch that a wheel requires, such as torch<2.15,>=2.13."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        match = re.search(r"^Requires-Dist: (torch.*)$", archive.read(name).decode(), re.MULTILINE)
    if match is None:
        raise RowError(f"{wheel.name} asks for no torch")
    return match[1]


def installed_wheel(python: Path, wheel: Path) -> bool:
    """Installs a wheel if its metadata accept the torch of the environment."""
    code = (
        "import sys, importlib.metadata as m; from packaging.requirements import Requirement as R; "
        "sys.exit(not R(sys.argv[1]).specifier.contains(m.version('torch'), prereleases=True))"
    )
    if subprocess.run([python, "-c", code, requirement(wheel)], check=False).returncode != 0:
        return False
    pip = (python, "-m", "pip", "install", "--quiet")
    run(*pip, "--no-deps", "--force-reinstall", wheel)
    run(*pip, wheel)  # what it depends on besides torch
    return True


def test_row(row: Row, work: Path, output: Path, wheels: list[Path], build_dir: Path | None) -> str:
    """Makes the environment of a row, installs a wheel in it and runs the tests; returns the row of the table."""
    folder = work / "environment"
    shutil.rmtree(folder, ignore_errors=True)
    python = make_environment(row, folder)
    version = run(python, "-c", "import torch, platform; print(torch.__version__, platform.python_version())").split()

    how = ""
    for wheel in reversed(wheels):
        if installed_wheel(python, wheel):
            how = f"{wheel.name}, loaded"
            break
    if not how:
        source = ROOT if build_dir else next((work / "source tree").glob("*"), None) or make_source(python, work)
        environment = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
        if build_dir:
            environment["MINIQUANT_BUILD_DIR"] = str(build_dir)
        built = work / "built"
        shutil.rmtree(built, ignore_errors=True)
        run(
            *(str(python), "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"),
            *("-w", built, source),
            env=environment,
        )
        (wheel,) = built.glob("*.whl")
        wheels.append(Path(shutil.copy(wheel, output)))
        if not installed_wheel(python, wheel):
            raise RowError(f"{wheel.name} asks for {requirement(wheel)}, and was built against torch {version[0]}")
        how = f"{wheel.name}, built"

    tests = sorted(path for pattern in TESTS for path in (ROOT / "tests" / "python").glob(pattern))
    report = run(
        *(str(python), "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"),
        *tests,
        env={"PYTHONPATH": ""},
    )
    package = Path(run(python, "-c", "import miniquant; print(miniquant.__file__, end='')", cwd=work))
    if folder not in package.parents:
        raise RowError(f"the tests ran with {package}, which is not the wheel")
    summary = report.splitlines()[-1].partition(" in ")[0]
    return f"| {version[0]} | {version[1]} | {how} | {summary} | {dt.datetime.now().astimezone():%Y-%m-%d} |\n"


def main() -> int:
    """Tests the given rows."""
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", type=Row.parse, metavar="TORCH[@PYTHON]", help="a row to test")
    parser.add_argument("--installed", action="store_true", help="a row with the torch of this Python")
    parser.add_argument(
        "--wheel", type=Path, action="append", default=[], help="a wheel made before, for the rows that it works with"
    )
    parser.add_argument(
        "--build-dir",
        type=Path,
        help="build the wheel from the clone in this build folder, not from a source distribution",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "build" / "torch_matrix",
        help="the folder for the wheels and the table (default build/torch_matrix)",
    )
    arguments = parser.parse_args()
    rows = arguments.rows + ([Row("installed", sys.executable)] if arguments.installed else [])
    output = arguments.output.resolve()
    if arguments.build_dir:
        arguments.build_dir = arguments.build_dir.resolve()
    output.mkdir(parents=True, exist_ok=True)

    table, failed, wheels = TABLE_HEAD, 0, list(arguments.wheel)
    with tempfile.TemporaryDirectory(prefix="torch_matrix-") as work:
        for row in rows or [Row.parse(version) for version in SUPPORTED]:
            print(f"==> torch {row.torch} with {row.python}", flush=True)
            try:
                line = test_row(row, Path(work), output, wheels, arguments.build_dir)
            except RowError as error:
                line = f"| {row.torch} | {row.python} | failed | | |\n"
                failed += 1
                print(error, file=sys.stderr)
            table += line
            print(line, end="", flush=True)
    (output / "torch_matrix.md").write_text(table)
    print(table, end="")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
