#!/usr/bin/env python3
"""Checks that includes and imports point down only: csrc/README.md lists the layers.

Every target compiles with csrc as an include folder, so the compiler itself accepts an include of a higher layer.
"""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
# The folders and public headers that a file of each layer may include.
ALLOWED = {
    "kernels": ("kernels/",),
    "algorithms": ("algorithms/", "kernels/", "miniquant/options.h", "miniquant/export.h"),
    "ops": ("ops/", "algorithms/", "kernels/", "miniquant/options.h", "miniquant/export.h"),
    "api": ("api/", "ops/", "algorithms/", "kernels/", "miniquant/"),
    "driver": ("driver/", "miniquant/"),
    "include": ("miniquant/",),
}
OURS = ("kernels/", "algorithms/", "ops/", "api/", "driver/", "miniquant/")
LIBTORCH = ("ATen/", "c10/", "torch/")


def wrong_includes(csrc: Path) -> Iterator[str]:
    """Yields the includes below `csrc` that a layer may not have."""
    for file in sorted(path for path in csrc.rglob("*") if path.suffix in {".h", ".cpp"}):
        layer = file.relative_to(csrc).parts[0]
        for name in INCLUDE.findall(file.read_text()):
            kernels_alone = layer == "kernels" and name.startswith(LIBTORCH)
            of_kernels_alone = layer != "kernels" and name.endswith("-inl.h")
            if kernels_alone or of_kernels_alone or (name.startswith(OURS) and not name.startswith(ALLOWED[layer])):
                yield f"{file}: {layer}/ may not include {name}"


def imports_of(file: Path, package: str) -> Iterator[str]:
    """The modules of `package` that a module of it imports, as `package.module`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ([f"{package}.{name.name}" for name in node.names] if node.module == package else [node.module])
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def import_cycle(folder: Path) -> list[str]:
    """Modules of the package in `folder` that import each other in a circle, or none."""
    modules = {
        ".".join((folder.name, *file.relative_to(folder).with_suffix("").parts)): file
        for file in folder.rglob("*.py")
        if file.name != "__init__.py"
    }
    graph = {name: set(imports_of(file, folder.name)) & modules.keys() for name, file in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def main() -> int:
    """Prints what is wrong and returns the exit status."""
    wrong = list(wrong_includes(ROOT / "csrc"))
    if cycle := import_cycle(ROOT / "src" / "miniquant"):
        wrong.append("src/miniquant: modules import each other: " + " -> ".join(cycle))
    print("\n".join(wrong) or "includes and imports point down only")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
