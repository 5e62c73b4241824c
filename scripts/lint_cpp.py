#!/usr/bin/env python3
"""Checks the C++ sources: clang-format all of them, clang-tidy those that the build compiles.

clang-tidy takes seconds for each file that includes torch's headers, so a file that passed is not checked again until
one of its dependencies changes: the file itself, a header of the project that it includes, its compile command,
.clang-tidy or clang-tidy itself.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("csrc", "tests", "examples", "benchmarks")
SUFFIXES = (".h", ".cpp")
# Flags of g++ that clang does not know, or that would make it write files.
DROPPED_FLAGS = re.compile(
    r"-fno-sanitize-recover=.*|-fsanitize=.*|-fno-sanitize=.*|-Werror|-M[DFT]?.*|-Winvalid-pch|-fpch-preprocess"
)


def project_files() -> list[Path]:
    """The C++ files that git tracks or would not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *FOLDERS],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    return sorted({ROOT / name for name in listing.split("\0") if name.endswith(SUFFIXES) and (ROOT / name).is_file()})


def check_format(files: Iterable[Path]) -> bool:
    """Whether clang-format leaves the files unchanged."""
    return (
        subprocess.run(
            ["clang-format", "--dry-run", "--Werror", "--style=file", *map(str, files)], check=False, cwd=ROOT
        ).returncode
        == 0
    )


def compile_commands(build: Path) -> dict[Path, tuple[list[str], str]]:
    """The compile command and the object of every source of the project, the first if it is compiled several times."""
    commands: dict[Path, tuple[list[str], str]] = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        source = Path(entry["file"])
        if any(source.is_relative_to(ROOT / folder) for folder in FOLDERS):
            command = shlex.split(entry["command"])
            commands.setdefault(source, (command, command[command.index("-o") + 1]))
    return commands


def project_headers(build: Path) -> dict[str, list[Path]]:
    """For each object, the headers of the project that it depends on, as recorded by Ninja."""
    text = subprocess.run(["ninja", "-C", str(build), "-t", "deps"], check=True, capture_output=True, text=True).stdout
    headers: dict[str, list[Path]] = {}
    current: list[Path] = []
    for line in text.splitlines():
        if line.startswith(" "):
            header = (build / line.strip()).resolve()
            if header.is_relative_to(ROOT) and not header.is_relative_to(ROOT / ".venv"):
                current.append(header)
        elif ": #deps" in line:
            current = headers.setdefault(line.split(": #deps")[0], [])
    return headers


def compiler_headers(compiler: str) -> list[str]:
    """The compiler's own header folder, to search last: clang's wheel has no omp.h."""
    folder = subprocess.run([compiler, "-print-file-name=include"], check=True, capture_output=True, text=True).stdout
    return ["-idirafter", folder.strip()]


def tidy_command(command: list[str]) -> list[str]:
    """The flags clang-tidy takes from a compile command: no compiler, no output, no input, no precompiled header."""
    compiler = next(part for part in command if Path(part).name != "ccache")
    flags: list[str] = []
    rest = iter(command[command.index(compiler) + 1 :])
    for part in rest:
        if part in {"-o", "-c", "-include"}:
            next(rest)
        elif not DROPPED_FLAGS.fullmatch(part):
            flags.append(part)
    return ["-Wno-unknown-warning-option", *flags, *compiler_headers(compiler)]


def digest(parts: Iterable[bytes]) -> str:
    """One hash of several strings, which also depends on where each ends."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def run_tidy(build: Path, only: list[Path], jobs: int) -> bool:
    """Runs clang-tidy on the sources that changed since they passed; whether it finds nothing."""
    passed = build.parent / "cache" / "clang-tidy"
    passed.mkdir(parents=True, exist_ok=True)
    version = subprocess.run(["clang-tidy", "--version"], check=True, capture_output=True).stdout
    settings = [
        ROOT / ".clang-tidy",
        *sorted(file for folder in FOLDERS for file in ROOT.glob(f"{folder}/**/.clang-tidy")),
    ]
    common = [version, *(file.read_bytes() for file in settings), Path(__file__).read_bytes()]
    headers = project_headers(build)
    pending: list[tuple[Path, list[str], Path]] = []
    commands = compile_commands(build)
    for source, (command, output) in sorted(commands.items()):
        if only and source not in only:
            continue
        flags = tidy_command(command)
        inputs = [path.read_bytes() for path in [source, *headers.get(output, [])] if path.is_file()]
        stamp = passed / digest([*common, str(source).encode(), "\0".join(flags).encode(), *inputs])
        if not stamp.exists():
            pending.append((source, flags, stamp))
    print(f"clang-tidy: {len(pending)} of {len(commands)} files changed since they passed", flush=True)

    def check(item: tuple[Path, list[str], Path]) -> bool:
        source, flags, stamp = item
        result = subprocess.run(
            ["clang-tidy", "--quiet", str(source), "--", *flags], check=False, cwd=build, capture_output=True, text=True
        )
        findings = result.stdout.strip()
        if result.returncode == 0 and not findings:
            stamp.touch()
            print(f"  ok      {source.relative_to(ROOT)}", flush=True)
            return True
        print(f"  FAILED  {source.relative_to(ROOT)}\n{findings or result.stderr}", flush=True)
        return False

    with ThreadPoolExecutor(jobs) as pool:
        return all(list(pool.map(check, pending)))


def main() -> int:
    """Runs the checks and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="sources to check (default: all)")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "release", help="a configured and built folder")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="clang-tidy processes at a time")
    parser.add_argument("--only", choices=["format", "tidy"], help="one of the two checks")
    arguments = parser.parse_args()

    files = [path.resolve() for path in arguments.files]
    good = True
    if arguments.only != "tidy":
        good &= check_format(files or project_files())
    if arguments.only != "format":
        good &= run_tidy(arguments.build.resolve(), files, arguments.jobs)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
