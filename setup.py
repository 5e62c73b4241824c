"""Builds the Python package. CMake holds the only list of sources; this file drives it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def project_version() -> str:
    """The version that project() in CMakeLists.txt states."""
    match = re.search(r"project\(miniquant VERSION (\d+\.\d+\.\d+)", (ROOT / "CMakeLists.txt").read_text())
    if match is None:
        raise RuntimeError(f"{ROOT / 'CMakeLists.txt'} states no version in project(miniquant VERSION ...)")
    return match[1]


def cmake_cache(build_dir: Path) -> dict[str, str]:
    """The variables of a configured build folder; none where it is not configured."""
    try:
        lines = (build_dir / "CMakeCache.txt").read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {m[1]: m[2] for line in lines if (m := re.fullmatch(r"(\w+):\w+=(.*)", line))}


def is_ours(build_dir: Path) -> bool:
    """Whether a build folder is a Release build of this very clone against this very torch."""
    cache = cmake_cache(build_dir)
    torch_dir = Path(torch.utils.cmake_prefix_path, "Torch")
    return (
        cache.get("CMAKE_HOME_DIRECTORY") == str(ROOT)
        and cache.get("CMAKE_BUILD_TYPE") == "Release"
        and Path(cache.get("Torch_DIR", "")).resolve() == torch_dir.resolve()
    )


class CMakeBuild(build_ext):
    """Builds the library with CMake and installs it into the package's ``lib`` folder."""

    def run(self) -> None:
        """Configures a build folder unless one can be reused, builds the library, installs it."""
        tools = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=tools)
        if cmake is None:
            raise RuntimeError("miniquant is built with CMake 3.25 or newer, and there is no cmake in PATH: install it")
        environment = {**os.environ, "PATH": tools}

        build_dir = self._build_dir()
        if not is_ours(build_dir):
            generator = ["-G", "Ninja"] if shutil.which("ninja", path=tools) else []
            subprocess.run(
                [
                    *(cmake, "-S", str(ROOT), "-B", str(build_dir), *generator),
                    *("-DCMAKE_BUILD_TYPE=Release", "-DMINIQUANT_BUILD_DRIVER=OFF"),
                    *(f"-DPython3_EXECUTABLE={sys.executable}", f"-DTorch_DIR={torch.utils.cmake_prefix_path}/Torch"),
                ],
                check=True,
                env=environment,
            )
        jobs = str(self.parallel or os.cpu_count() or 1)
        subprocess.run(
            [cmake, "--build", str(build_dir), "--target", "miniquant", "--parallel", jobs], check=True, env=environment
        )
        subprocess.run(
            [cmake, "--install", str(build_dir), "--component", "python", "--prefix", str(self._lib_dir())],
            check=True,
            env=environment,
        )

    def _build_dir(self) -> Path:
        if given := os.environ.get("MINIQUANT_BUILD_DIR"):
            return Path(given).resolve()
        release = ROOT / "build" / "release"
        return release if is_ours(release) else ROOT / "build" / "python"

    def _lib_dir(self) -> Path:
        """The source tree's folder for an editable install, the build's for any other."""
        package = ROOT / "src" / "miniquant" if self.inplace else Path(self.build_lib).resolve() / "miniquant"
        return package / "lib"

    def get_source_files(self) -> list[str]:
        """None: CMake knows them, MANIFEST.in names them for a source distribution."""
        return []

    def get_outputs(self) -> list[str]:
        """What the install step put into the package."""
        return [str(self._lib_dir() / "libminiquant.so")]

    def get_output_mapping(self) -> dict[str, str]:
        """Empty: an editable install uses the library where the install step put it."""
        return {}


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any Python 3: the library is native, and uses nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return "py3", "none", self.plat_name.replace("-", "_") if self.plat_name_supplied else platform


setup(
    version=project_version(),
    ext_modules=[Extension("miniquant.lib", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
