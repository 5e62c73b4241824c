"""Shared code of the benchmarks: the problems, the limit, interleaved timing, the machine, files of results.

For a weight [N, K] and T tokens the min number of multiplications and additions is

    Hessian    T K^2            because H is symmetric
    gptq       N K^2 + K^3 / 3  for the sweep and one Cholesky factorization

The "limit" is the time that torch.mm, at the same sizes and in the same run, would need for as many operations. Ratios
to the limit can be compared between machines; milliseconds cannot.
"""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import miniquant

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# For results that are not kept in the repository.
SCRATCH = ROOT / "build" / "benchmarks"
LEAST_ROUNDS = 3


def hessian_flops(tokens: int, columns: int) -> float:
    """Multiplications and additions of X X^T; one triangle is enough."""
    return float(tokens) * columns**2


def gptq_flops(rows: int, columns: int) -> float:
    """Multiplications and additions of the sweep and one Cholesky factorization."""
    return float(rows) * columns**2 + columns**3 / 3


def product_flops(rows: int, inner: int, columns: int) -> float:
    """Multiplications and additions of a matrix product [rows, inner] [inner, columns]."""
    return 2.0 * rows * inner * columns


def random_weight(rows: int, columns: int, seed: int = 1) -> Tensor:
    """A random weight [rows, columns], with values of the magnitude of trained layers."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def correlated_inputs(tokens: int, columns: int) -> Tensor:
    """Correlated inputs [tokens, columns] with uneven channel energy."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    mix.diagonal().add_(1)
    energy = torch.exp(torch.randn(columns, generator=generator) * 0.7)
    inputs: Tensor = (torch.randn(tokens, columns, generator=generator) * energy) @ mix
    return inputs


def interleaved(runs: Mapping[str, Callable[[], object]], least_seconds: float) -> dict[str, float]:
    """The shortest time of each run. The runs take turns, so a slow phase of the machine affects all of them.

    One round of warm-up is not counted. Then there are at least three rounds, and as many as fit into `least_seconds`
    for each run.
    """
    for run in runs.values():
        run()
    fastest = dict.fromkeys(runs, float("inf"))
    end = time.perf_counter() + least_seconds * len(runs)
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            fastest[name] = min(fastest[name], time.perf_counter() - start)
        rounds += 1
    return fastest


def cpu_fields() -> dict[str, str]:
    """The entries of /proc/cpuinfo for the first processor."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n", 1)[0] if path.is_file() else ""
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def machine(threads: int) -> dict[str, Any]:
    """The CPU model, the number of CPUs and threads, and the instruction set of the kernels."""
    fields = cpu_fields()
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return {
        "cpu": name,
        "cpus": os.cpu_count(),
        "threads": threads,
        "instruction_set": str(torch.ops.miniquant.instruction_set()),
    }


def versions() -> dict[str, str]:
    """The versions of miniquant, torch and Python."""
    return {
        "miniquant": miniquant.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def command_line(*program: str) -> str:
    """The command that started this process, as typed in the root of the clone."""
    return shlex.join([*program, *sys.argv[1:]])


def machine_line(results: Mapping[str, Any]) -> str:
    """One line of Markdown with the command, machine and versions that the figures come from."""
    where = results["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"`{results['command']}` on {where['cpu']}, {where['instruction_set']}, "
        f"{where['threads']} of {where['cpus']} CPUs; {packages}."
    )


def milliseconds(seconds: float) -> str:
    """A time in milliseconds, with three digits."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.0995 else f"{seconds * 1e3:.3g}"


def write_results(results: Mapping[str, Any], markdown: str, folder: Path, stem: str) -> None:
    """Writes <stem>.json and <stem>.md into a folder, which is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / f"{stem}.md").write_text(markdown)
    try:
        shown = folder.resolve().relative_to(Path.cwd())
    except ValueError:
        shown = folder
    print(markdown)
    print(f"wrote {shown / stem}.json and {shown / stem}.md")
