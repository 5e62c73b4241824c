#!/usr/bin/env python3
"""Checks the C++ sources: clang-format all of them, clang-tidy those that the build compiles.

clang-tidy takes seconds to read torch's headers. Therefore the sources of a folder are checked several at a time, one
after the other in one translation unit, and one by one only if something is found there. A source that passed is not
checked again until one of its dependencies changes: the file itself, a header of the project that it includes, its
compile command, .clang-tidy or clang-tidy itself.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("csrc", "tests", "examples", "benchmarks")
SUFFIXES = (".h", ".cpp")
BATCH_SIZE = 8  # sources read by one run of clang-tidy
# readability-duplicate-include starts anew where a macro is defined.
FORGET_INCLUDES = "#define MINIQUANT_NEXT_SOURCE\n#undef MINIQUANT_NEXT_SOURCE\n"
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


@dataclass(frozen=True)
class Source:
    """A source to check, the flags it is compiled with, and the file that says it passed."""

    path: Path
    flags: list[str]
    stamp: Path


def pending_sources(build: Path, only: list[Path]) -> tuple[list[Source], int]:
    """The sources that changed since they passed, and how many there are in all."""
    passed = build.parent / "cache" / "clang-tidy"
    passed.mkdir(parents=True, exist_ok=True)
    version = subprocess.run(["clang-tidy", "--version"], check=True, capture_output=True).stdout
    settings = [
        ROOT / ".clang-tidy",
        *sorted(file for folder in FOLDERS for file in ROOT.glob(f"{folder}/**/.clang-tidy")),
    ]
    common = [version, *(file.read_bytes() for file in settings), Path(__file__).read_bytes()]
    headers = project_headers(build)
    pending: list[Source] = []
    commands = compile_commands(build)
    for path, (command, output) in sorted(commands.items()):
        if only and path not in only:
            continue
        flags = tidy_command(command)
        inputs = [file.read_bytes() for file in [path, *headers.get(output, [])] if file.is_file()]
        stamp = passed / digest([*common, str(path).encode(), "\0".join(flags).encode(), *inputs])
        if not stamp.exists():
            pending.append(Source(path, flags, stamp))
    return pending, len(commands)


def batches_of(sources: Iterable[Source]) -> list[list[Source]]:
    """Sources that can be read together: of one folder, which has one .clang-tidy, and compiled with the same flags."""
    alike: dict[tuple[Path, str], list[Source]] = {}
    for source in sources:
        alike.setdefault((source.path.parent, "\0".join(source.flags)), []).append(source)
    return [group[begin : begin + BATCH_SIZE] for group in alike.values() for begin in range(0, len(group), BATCH_SIZE)]


def findings_of(batch: list[Source], build: Path) -> str:
    """What clang-tidy says about sources read as one; empty where all is well."""
    main, options = batch[0].path, []
    with tempfile.TemporaryDirectory() as folder:
        if len(batch) > 1:
            # Not files that include the sources: the analyzer takes functions of the main file only. The file seems to
            # lie in the sources' folder, because clang-tidy looks for .clang-tidy there.
            main = main.with_name("clang_tidy_batch.cpp")
            content, overlay = Path(folder) / main.name, Path(folder) / "overlay.json"
            content.write_text("\n".join(f"{source.path.read_text()}\n{FORGET_INCLUDES}" for source in batch))
            file = {"type": "file", "name": str(main), "external-contents": str(content)}
            overlay.write_text(json.dumps({"version": 0, "roots": [file]}))
            options = [f"--vfsoverlay={overlay}"]
        result = subprocess.run(
            ["clang-tidy", "--quiet", *options, str(main), "--", *batch[0].flags],
            check=False,
            cwd=build,
            capture_output=True,
            text=True,
        )
    return result.stdout.strip() or (result.stderr if result.returncode else "")


def run_tidy(build: Path, only: list[Path], jobs: int) -> bool:
    """Runs clang-tidy on the sources that changed since they passed; whether it finds nothing."""
    pending, total = pending_sources(build, only)
    print(f"clang-tidy: {len(pending)} of {total} files changed since they passed", flush=True)

    def check(batch: list[Source]) -> bool:
        findings = findings_of(batch, build)
        if findings and len(batch) > 1:
            return all(list(map(check, ([source] for source in batch))))  # all of them, also after a failure
        for source in batch:
            if not findings:
                source.stamp.touch()
            print(
                f"  {'FAILED' if findings else 'ok    '}  {source.path.relative_to(ROOT)}\n{findings}".rstrip(),
                flush=True,
            )
        return not findings

    with ThreadPoolExecutor(jobs) as pool:
        return all(list(pool.map(check, batches_of(pending))))


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
