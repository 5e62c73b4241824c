"""The driver gptq_toy, found and run."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

NAME = "gptq_toy"
_CLONE = Path(__file__).resolve().parents[2]


def find_driver(clone: Path = _CLONE) -> Path:
    """The driver of the clone that the package is in, otherwise the one in PATH.

    Raises:
        FileNotFoundError: where there is neither.
    """
    built = clone / "build" / "release" / "bin" / NAME
    if (clone / "CMakeLists.txt").is_file() and built.is_file():
        return built
    found = shutil.which(NAME)
    if found is None:
        raise FileNotFoundError(
            f"find_driver: expected the program {NAME} in PATH or in a clone's build/release/bin, but got none "
            "(scripts/setup of a clone builds it)"
        )
    return Path(found)


def run_driver(arguments: Sequence[str]) -> int:
    """Runs the driver, and gives its exit code; 128 + n where signal n ended it."""
    code = subprocess.run([find_driver(), *arguments], check=False).returncode
    return code if code >= 0 else 128 - code
