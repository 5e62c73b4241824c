"""Measures what a second process brings to a run, and carries that to many machines.

SmolLM2-135M-Instruct is quantized by one process of one thread, and by two of one thread each (``torchrun``). Two runs
of one process, at once and with nothing in common, show what the machine leaves of a second process: caches, memory and
the clock are shared. The rate of gloo is measured between two processes. From the parts of the first run, the rate and
the bytes that ranks send, a formula gives the time of any number of ranks. Writes results/ranks.json and ranks.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.common.measuring import (
    RESULTS,
    SCRATCH,
    command_line,
    hessian_flops,
    machine,
    machine_line,
    product_flops,
    versions,
    write_results,
)
from benchmarks.common.tables import table
from benchmarks.models.common import report_of_run
from scripts.smollm2 import write_folder

SUMS = 3  # of a layer's inputs: two halves of the calibration tokens, and those held out
RATE_ELEMENTS = 1 << 24  # of float32, in one message
# Llama-2-70B: blocks; for each set of inputs its columns, and the rows of all layers that it is given to.
LARGE_BLOCKS = 80
LARGE = ((8192, 8192 + 2 * 1024), (8192, 8192), (8192, 2 * 28672), (28672, 8192))
LARGE_TOKENS = 262144
MACHINE_RATE = 1e12  # assumed: operations per second of a machine in such products
NETWORK_RATE = 1.25e9  # assumed: bytes per second between machines, 10 Gbit/s


class Parts(NamedTuple):
    """Seconds of a run: what ranks share, and what each does."""

    shared: float
    alone: float


def sums_bytes(columns: int, ranks: int) -> float:
    """That a rank sends for the sums of one set of inputs: a triangle of each."""
    return 2 * (ranks - 1) / ranks * 4 * SUMS * columns**2 / 2


def run(folder: Path, output: Path, text: Path, preset: str, ranks: int) -> dict[str, Any]:
    """The report of a run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    given = ["--calibration", str(text), "--preset", preset, "--dtype", "float32"]
    options = ["--threads", "1", "--sequence-length", "512", "--overwrite"]
    return report_of_run(folder, output, *given, *options, launcher=launcher)


def seconds_at_once(folder: Path, work: Path, text: Path, preset: str) -> float:
    """Of two runs of one process each, the mean."""
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, folder, work / f"ranks-{name}", text, preset, 1) for name in "ab"]
    return statistics.mean(float(one.result()["seconds"]["total"]) for one in runs)


def rate_of_gloo() -> float:
    """Bytes per second that each of two processes sends while they sum a tensor."""
    program = f"import benchmarks.models.ranks as ranks; ranks.measure_rate({RATE_ELEMENTS})"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    said = subprocess.run(
        [*command, sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return float(said.split()[0])


def measure_rate(elements: int) -> None:
    """One of the two processes; prints the rate where it is the first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    values = torch.ones(elements)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - start)
    if int(os.environ["RANK"]) == 0:
        print(values.nbytes / min(seconds[1:]))
    dist.destroy_process_group()


def predicted(parts: Parts, sent: float, ranks: int, rate: float) -> float:
    """Seconds of a run by so many ranks."""
    return parts.shared / ranks + parts.alone + sent / rate


def large_model(ranks: int) -> dict[str, float]:
    """Hours of Llama-2-70B by so many machines, by part."""
    forward = sum(product_flops(LARGE_TOKENS, columns, rows) for columns, rows in LARGE)
    hessians = sum(hessian_flops(LARGE_TOKENS, columns) for columns, _ in LARGE)
    sweeps = sum(float(rows) * columns**2 for columns, rows in LARGE)
    factors = sum(columns**3 / 3 for columns, _ in LARGE)
    sent = sum(sums_bytes(columns, ranks) + rows * columns for columns, rows in LARGE)
    hours = LARGE_BLOCKS / 3600
    return {
        "ranks": ranks,
        "forward": hours * forward / ranks / MACHINE_RATE,
        "hessians": hours * hessians / ranks / MACHINE_RATE,
        "sweeps": hours * sweeps / ranks / MACHINE_RATE,
        "factors": hours * factors / MACHINE_RATE,
        "messages": hours * sent / NETWORK_RATE if ranks > 1 else 0.0,
    }


def markdown(results: dict[str, Any]) -> str:
    """Both tables."""
    header = ["preset", "one process, s", "two, s", "speed-up", "two unrelated ones, s", "speed-up without ranks"]
    header += ["as the formula has it", "sent by a rank"]
    rows = [
        [
            row["preset"],
            f"{row['one']:.1f}",
            f"{row['two']:.1f}",
            f"**{row['one'] / row['two']:.2f}**",
            f"{row['at_once']:.1f}",
            f"{2 * row['one'] / row['at_once']:.2f}",
            f"{row['one'] / row['predicted']:.2f}",
            f"{row['sent'] / 1e9:.2f} GB",
        ]
        for row in results["rows"]
    ]
    parts = ("forward", "hessians", "sweeps", "factors", "messages")
    large = [
        [str(row["ranks"]), *(f"{row[part]:.2f}" for part in parts), f"{sum(row[part] for part in parts):.2f}"]
        for row in results["large"]
    ]
    assumed = (
        f"Llama-2-70B with {LARGE_TOKENS} tokens, preset fast, in hours; computed, not measured: machines of "
        f"{MACHINE_RATE / 1e12:.0f} Tflop/s, {NETWORK_RATE / 1e9:.2f} GB/s between them."
    )
    return (
        "\n\n".join(
            [
                f"SmolLM2, one thread for each process; gloo sends {results['rate'] / 1e9:.2f} GB/s between the two.",
                table(header, rows, numbers=True),
                assumed,
                table(["machines", *parts, "all"], large, numbers=True),
                machine_line(results),
            ]
        )
        + "\n"
    )


def main() -> None:
    """Measures both presets and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="of calibration")
    parser.add_argument("--presets", nargs="+", default=["fast", "best"])
    parser.add_argument("--work", type=Path, default=SCRATCH / "models", help="folder for models")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    folder = arguments.work / "float"
    write_folder(folder)
    rate = rate_of_gloo()
    rows = []
    for preset in arguments.presets:
        one, two = (run(folder, arguments.work / "ranks", arguments.text, preset, ranks) for ranks in (1, 2))
        seconds = one["seconds"]
        # Judging is rank 0's. So is the choice of ridges, which counts as solving, and is shared here.
        shared = Parts(seconds["total"] - seconds["judging"], seconds["judging"])
        columns = {tuple(layer["shape"])[1] for layer in one["layers"]}
        sets = {576: 3, 1536: 1}  # sets of inputs of a block: attention, its output, the MLP; down projections
        sent = 30 * sum(sets[width] * sums_bytes(width, 2) for width in columns)
        rows.append(
            {
                "preset": preset,
                "one": seconds["total"],
                "two": two["seconds"]["total"],
                "at_once": seconds_at_once(folder, arguments.work, arguments.text, preset),
                "predicted": predicted(shared, sent, 2, rate),
                "sent": sent,
                "parts": seconds,
                "notes": two["notes"],
            }
        )
    results = {
        "command": command_line("scripts/benchmark", "ranks"),
        "machine": machine(1),
        "versions": versions(),
        "rate": rate,
        "rows": rows,
        "large": [large_model(ranks) for ranks in (1, 4, 16, 64)],
    }
    write_results(results, markdown(results), arguments.output, "ranks")


if __name__ == "__main__":
    main()
