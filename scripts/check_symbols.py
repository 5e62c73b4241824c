#!/usr/bin/env python3
"""Checks that the kernels compiled for one instruction set define no symbol that other objects could pick up.

An inline function or template instance compiled with AVX-512 is a weak symbol. The linker keeps one definition of
several, so a machine without AVX-512 could run it. nm marks such symbols W, V or u.
"""

import argparse
import subprocess
import sys
from pathlib import Path

WEAK = {"W", "V", "w", "v", "u"}


def weak_definitions(build: Path) -> tuple[int, list[str]]:
    """The number of kernel objects in a build, and the weak definitions in them."""
    objects = sorted(build.glob("csrc/kernels/CMakeFiles/miniquant_kernels_*.dir/**/*.o"))
    found: list[str] = []
    for path in objects:
        listing = subprocess.run(
            ["nm", "--defined-only", "--demangle", str(path)], check=True, capture_output=True, text=True
        ).stdout
        for line in listing.splitlines():
            fields = line.split(maxsplit=2)
            if fields[1] in WEAK:
                found.append(f"{path.parent.name}/{path.name}: {fields[1]} {fields[2]}")
    return len(objects), found


def main() -> int:
    """Runs the check and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", type=Path, help="build folders")
    status = 0
    for build in parser.parse_args().builds:
        count, found = weak_definitions(build)
        if count == 0:
            print(f"{build}: no objects of miniquant_kernels_*: is it built?", file=sys.stderr)
            status = 1
        for line in found:
            print(f"{build}: {line}", file=sys.stderr)
            status = 1
        if not found and count:
            print(f"{build}: {count} objects of kernels define no weak symbol")
    return status


if __name__ == "__main__":
    sys.exit(main())
