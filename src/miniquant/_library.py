"""The native library: checks that it works with the installed torch, and loads it."""

import json
import re
from pathlib import Path
from typing import TypedDict, cast

import torch

FOLDER = Path(__file__).parent / "lib"
LIBRARY = FOLDER / "libminiquant.so"

REBUILD = (
    "Run scripts/setup in a clone, or build the package for this torch: `pip install --no-build-isolation "
    "--no-deps --force-reinstall .` in the source tree"
)


class Build(TypedDict):
    """What the build wrote beside the library, in build.json."""

    torch: str  # the version it was built against
    torch_min: str  # the oldest version it works with
    torch_below: str  # the first newer version it does not work with


def read_build() -> Build:
    """Reads which versions of torch the library was built for.

    Raises:
        ImportError: The library or its build.json is missing.
    """
    for path in (LIBRARY, FOLDER / "build.json"):
        if not path.is_file():
            raise ImportError(f"miniquant's library is missing: expected {path}. {REBUILD}.")
    return cast("Build", json.loads((FOLDER / "build.json").read_text()))


def numbers(version: str) -> tuple[int, ...]:
    """Major and minor number of a version: 2.13.0+cpu as (2, 13)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def load_library() -> None:
    """Registers the operators, unless they are registered already.

    Raises:
        ImportError: There is no library, it was built for other versions of torch, or the loader refuses it.
    """
    if hasattr(torch.ops.miniquant, "gptq"):
        return
    build = read_build()
    served = f"torch>={build['torch_min']},<{build['torch_below']}"
    # Checked before loading: a library for another version may load and then misread a tensor's memory.
    if not numbers(build["torch_min"]) <= numbers(torch.__version__) < numbers(build["torch_below"]):
        raise ImportError(
            f"miniquant's library was built against torch {build['torch']} and works with {served}, "
            f"but torch {torch.__version__} is installed. {REBUILD}; or install such a torch: `pip install '{served}'`."
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise ImportError(
            f"miniquant's library, built against torch {build['torch']}, does not load with torch {torch.__version__}: "
            f"{error}. {REBUILD}."
        ) from error
