"""Builds the Python package. CMake holds the only list of sources; this file drives it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# That the package needs beside torch.
LIBRARIES = [
    "greenlet>=3",
    "jsonschema>=4.18",
    "rich>=13.7",
    "safetensors>=0.4",
    "tomli>=2; python_version < '3.11'",
    "typer>=0.12",
]
TORCH_RULES = ROOT / "cmake" / "MiniquantTorch.cmake"


def fail(message: str) -> NoReturn:
    """Ends the build with one message and no traceback."""
    sys.exit(f"error: {message}")


def first_group(pattern: str, path: Path) -> str:
    """The text that the first group of a pattern matches in a file of the project."""
    match = re.search(pattern, path.read_text())
    if match is None:
        raise RuntimeError(f"{path}: expected a text that matches {pattern!r}")
    return match[1]


def project_version() -> str:
    """The version that project() in CMakeLists.txt states."""
    return first_group(r"project\(miniquant VERSION (\d+\.\d+\.\d+)", ROOT / "CMakeLists.txt")


def torch_cmake_dir() -> Path | None:
    """The folder of the installed torch's CMake package, or None. It does not import torch, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0], "share", "cmake", "Torch")


def torch_version(cmake_dir: Path) -> str:
    """The version of the torch of a CMake package, for example 2.13.0."""
    return first_group(r'PACKAGE_VERSION "(\d+\.\d+[^"]*)"', cmake_dir / "TorchConfigVersion.cmake")


def supported_torch() -> str:
    """The requirement for the versions of torch that the source is tested with."""
    minimum = first_group(r"set\(MINIQUANT_TORCH_MIN ([\d.]+)\)", TORCH_RULES)
    return f"torch>={minimum},<{first_group(r'set.MINIQUANT_TORCH_BELOW ([0-9.]+).', TORCH_RULES)}"


def served_torch(version: str) -> tuple[str, str]:
    """The range of torch versions, without its end, that a library built against `version` works with.

    The rule is the same as in miniquant_torch_served() of cmake/MiniquantTorch.cmake.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    for binary in first_group(r"set\(MINIQUANT_TORCH_BINARIES ([^)]+)\)", TORCH_RULES).split():
        minimum, below = binary.split("-")
        if numbers(minimum) <= (major, minor) < numbers(below):
            return minimum, below
    return f"{major}.{minor}", f"{major}.{minor + 1}"


def numbers(version: str) -> tuple[int, ...]:
    """2.13 as (2, 13)."""
    return tuple(int(part) for part in version.split("."))


def environment() -> dict[str, str]:
    """The environment for CMake: tools in this Python's scripts folder come first in PATH."""
    return {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}


def find_cmake() -> str:
    """The path of CMake."""
    cmake = shutil.which("cmake", path=environment()["PATH"])
    if cmake is None:
        fail("miniquant is built with CMake 3.25 or newer, and there is none in PATH: type `pip install cmake ninja`")
    return cmake


def cmake_cache(build_dir: Path) -> dict[str, str]:
    """The cache variables of a build folder whose configuration is complete; empty for any other folder.

    CMake writes CMakeCache.txt even if configuration fails, but the files of the generator only at the end.
    """
    try:
        lines = (build_dir / "CMakeCache.txt").read_text().splitlines()
    except FileNotFoundError:
        return {}
    cache = {m[1]: m[2] for line in lines if (m := re.fullmatch(r"(\w+):\w+=(.*)", line))}
    generated = "build.ninja" if cache.get("CMAKE_GENERATOR", "").startswith("Ninja") else "Makefile"
    return cache if (build_dir / generated).is_file() else {}


def is_ours(build_dir: Path, torch_dir: Path) -> bool:
    """Whether a build folder is a Release build of this clone against this torch, with tools that still exist."""
    cache = cmake_cache(build_dir)
    return (
        cache.get("CMAKE_HOME_DIRECTORY") == str(ROOT)
        and cache.get("CMAKE_BUILD_TYPE") == "Release"
        and Path(cache.get("Torch_DIR", "")).resolve() == torch_dir.resolve()
        and Path(cache.get("CMAKE_MAKE_PROGRAM", "")).is_file()
    )


def run_cmake(step: str, *arguments: str) -> None:
    """Runs CMake; if it fails, the build ends with the lines that give the reason, not with the whole output."""
    result = subprocess.run(
        [find_cmake(), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        env=environment(),
    )
    if result.returncode == 0:
        return
    lines = result.stdout.rstrip().splitlines()
    is_reason = re.compile(r"CMake Error|FAILED:|ninja: error|.*: (fatal )?error:").match
    first = next((i for i, line in enumerate(lines) if is_reason(line)), -40)
    reason = lines[first:][:40]
    fail(f"CMake could not {step}:\n" + "\n".join(f"  {line}" for line in reason if line.strip()))


class CMakeBuild(build_ext):
    """Builds the library with CMake and installs it into the package's ``lib`` folder."""

    def run(self) -> None:
        """Configures a build folder unless one can be reused, then builds and installs the library."""
        torch_dir = require_torch()
        build_dir = self._build_dir(torch_dir)
        if not is_ours(build_dir, torch_dir):
            generator = ["-G", "Ninja"] if shutil.which("ninja", path=environment()["PATH"]) else []
            # --fresh: ignores the cache of a failed configuration or of another environment.
            run_cmake(
                f"configure {build_dir}",
                *("--fresh", "-S", str(ROOT), "-B", str(build_dir), *generator),
                *("-DCMAKE_BUILD_TYPE=Release", "-DMINIQUANT_BUILD_DRIVER=OFF"),
                *(f"-DPython3_EXECUTABLE={sys.executable}", f"-DTorch_DIR={torch_dir}"),
            )
        jobs = str(self.parallel or os.cpu_count() or 1)
        run_cmake("build the library", "--build", str(build_dir), "--target", "miniquant", "--parallel", jobs)
        run_cmake(
            "install the library",
            *("--install", str(build_dir), "--component", "python", "--prefix", str(self._lib_dir())),
        )

    def _build_dir(self, torch_dir: Path) -> Path:
        if given := os.environ.get("MINIQUANT_BUILD_DIR"):
            return Path(given).resolve()
        release = ROOT / "build" / "release"
        return release if is_ours(release, torch_dir) else ROOT / "build" / "python"

    def _lib_dir(self) -> Path:
        """The source tree's folder for an editable install, the build's for any other."""
        package = ROOT / "src" / "miniquant" if self.inplace else Path(self.build_lib).resolve() / "miniquant"
        return package / "lib"

    def get_source_files(self) -> list[str]:
        """No files: CMake has the list of sources, and MANIFEST.in the list for a source distribution."""
        return []

    def get_outputs(self) -> list[str]:
        """The files that the install step put into the package."""
        return [str(self._lib_dir() / name) for name in ("libminiquant.so", "build.json")]

    def get_output_mapping(self) -> dict[str, str]:
        """No mapping: an editable install uses the library in the folder of the install step."""
        return {}


class CleanBuild(build_py):
    """Copies the modules into an empty folder, so a removed module does not come back from an earlier build."""

    def run(self) -> None:
        """Empties the folder and copies the modules."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "miniquant", ignore_errors=True)
        super().run()


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any Python 3: the library is native and does not use Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return "py3", "none", self.plat_name.replace("-", "_") if self.plat_name_supplied else platform


def require_torch() -> Path:
    """The folder of the installed torch's CMake package; the build ends with an error if there is none."""
    torch_dir = torch_cmake_dir()
    if torch_dir is None:
        fail(
            "miniquant is built against the torch that is installed, and this Python has none: "
            f"type `pip install '{supported_torch()}'` first, or leave out --no-build-isolation"
        )
    return torch_dir


def metadata() -> dict[str, object]:
    """Version and dependencies: those of the source for a source distribution, otherwise those of the binary.

    A binary works with some versions of torch only, so its metadata require these, and its version names the oldest, as
    in 0.1.0+torch2.13. A build from a source distribution keeps the version of that distribution, because pip compares
    the two.
    """
    source: dict[str, object] = {"version": project_version(), "install_requires": [supported_torch(), *LIBRARIES]}
    # These commands of setuptools' build backend describe a binary.
    if not {"dist_info", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv):
        return source
    minimum, below = served_torch(torch_version(require_torch()))
    local = "" if (ROOT / "PKG-INFO").is_file() else f"+torch{minimum}"
    return {"version": f"{source['version']}{local}", "install_requires": [f"torch>={minimum},<{below}", *LIBRARIES]}


if __name__ == "__main__":
    setup(
        **metadata(),
        ext_modules=[Extension("miniquant.lib", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuild, "bdist_wheel": PlatformWheel},
    )
