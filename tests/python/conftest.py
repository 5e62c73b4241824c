"""Shared fixtures: the root of the clone, a seeded generator, programs built with the installed library."""

import importlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the clone."""
    return ROOT


@pytest.fixture(scope="session")
def build_dir() -> Path:
    """The Release build: build/release, which scripts/setup makes, unless MINIQUANT_BUILD_DIR names another folder."""
    build = Path(os.environ.get("MINIQUANT_BUILD_DIR", ROOT / "build" / "release")).resolve()
    if not (build / "build.ninja").is_file():
        pytest.fail(f"{build} is not a configured build: run scripts/setup")
    return build


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, whether it runs alone or with others."""
    torch.manual_seed(42)


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    """Restores the number of threads after every test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a model folder, float32."""
    folder = tmp_path_factory.mktemp("smollm2") / "float"
    try:
        importlib.import_module("scripts.smollm2").write_folder(folder)
    except ImportError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """Runs a command and returns its standard output; if it fails, the test fails with its whole output."""

    def run_(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        result = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=None if env is None else {**os.environ, **env},
            check=False,
        )
        if result.returncode != 0:
            pytest.fail(
                f"{' '.join(map(str, command))}\nended with {result.returncode}\n{result.stdout}\n{result.stderr}"
            )
        return result.stdout

    return run_


@pytest.fixture(scope="session")
def installed_tree(build_dir: Path, tmp_path_factory: pytest.TempPathFactory, run: Callable[..., str]) -> Path:
    """A prefix with the files that `cmake --install` installs."""
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", build_dir, "--prefix", prefix)
    return prefix


@pytest.fixture(scope="session")
def consumer(installed_tree: Path, tmp_path_factory: pytest.TempPathFactory, run: Callable[..., str]) -> Path:
    """The folder with the programs of tests/consumer, built against the installed tree.

    consumer_torchscript MODEL.pt and consumer_aoti PACKAGE.pt2 feed the inputs of tests/consumer/problem.h (in Python:
    consumer_problem) and print ``codes_checksum <integer>``.
    """
    build = tmp_path_factory.mktemp("consumer")
    run(
        *("cmake", "-S", ROOT / "tests" / "consumer", "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *(f"-DCMAKE_PREFIX_PATH={installed_tree}", f"-DPython3_EXECUTABLE={sys.executable}"),
    )
    run("cmake", "--build", build, "--parallel", "2")
    return build


@pytest.fixture
def consumer_problem() -> tuple[torch.Tensor, torch.Tensor]:
    """The weight [12, 96] and Hessian [96, 96] of tests/consumer/problem.h, bit for bit; its group size is 32."""
    row, column = torch.arange(12)[:, None], torch.arange(96)
    weight = ((7 * row + 3 * column + row * column) % 31 - 15).float() / 64
    hessian = torch.exp2(-(column[:, None] - column).abs().float())
    return weight, hessian


@pytest.fixture(scope="session")
def codes_checksum() -> Callable[[torch.Tensor], int]:
    """The number that the consumer programs print for codes: sum of (index + 1) * code, row-major."""

    def codes_checksum_(codes: torch.Tensor) -> int:
        flat = codes.flatten().long()
        return int((torch.arange(1, flat.numel() + 1) * flat).sum())

    return codes_checksum_


@pytest.fixture
def mutations(request: pytest.FixtureRequest) -> Callable[[bytes, int], Iterator[bytes]]:
    """Copies of a file's content, each damaged in a few places; the same for a test each time it runs."""
    generator = random.Random(request.node.name)  # noqa: S311

    def mutations_(content: bytes, count: int) -> Iterator[bytes]:
        for _ in range(count):
            damaged = bytearray(content)
            for _ in range(generator.randint(1, 3)):
                start = generator.randrange(len(damaged) + 1)
                removed = generator.choice([0, 1, 1, 3, len(damaged)])
                limit = generator.choice([128, 256])  # of bytes that text may have, or of all
                added = bytes(generator.randrange(limit) for _ in range(generator.choice([0, 1, 1, 4])))
                damaged[start : start + removed] = added
            yield bytes(damaged)

    return mutations_
