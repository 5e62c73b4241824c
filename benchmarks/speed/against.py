"""Times this clone's gptq, rtn and Hessians against those of another clone of the project, which is built.

`python -m benchmarks.speed.against CLONE` starts a process for each, which take turns, so a slow phase of the machine
affects both. Writes against.json and against.md into benchmarks/results.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, cast

import torch
from tqdm import tqdm

import miniquant
from benchmarks.common.measuring import (
    RESULTS,
    ROOT,
    correlated_inputs,
    machine,
    machine_line,
    milliseconds,
    random_weight,
    versions,
    write_results,
)
from benchmarks.common.tables import table

WORKER = "worker"
LEAST_CALLS = 5
MOST_CALLS = 400
# Between two calls, so the threads of one process do not spin while the other computes.
PAUSE_SECONDS = 0.01


def layers(count: int, rows: int, columns: int, group_size: int, **options: Any) -> Callable[[], object]:
    """Quantizes layers of one size, one after the other."""
    inputs = correlated_inputs(min(2 * columns, 2048), columns)
    accumulator = miniquant.HessianAccumulator(columns)
    accumulator.update(inputs)
    hessian = accumulator.hessian()
    problems = [(random_weight(rows, columns, seed), hessian.clone()) for seed in range(count)]

    def run() -> None:
        for weight, own in problems:
            miniquant.gptq(weight, own, group_size=group_size, **options)

    return run


def batch(tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """Adds a batch to a Hessian."""
    inputs = correlated_inputs(tokens, columns).to(dtype)
    accumulator = miniquant.HessianAccumulator(columns)
    return partial(accumulator.update, inputs)


def preset(name: Literal["fast", "best"], rows: int, group_size: int) -> Callable[[], object]:
    """Quantizes a square layer with a preset."""
    return layers(1, rows, rows, group_size, **miniquant.preset(name))


def rounding(rows: int) -> Callable[[], object]:
    """Rounds a square weight to nearest."""
    return partial(miniquant.rtn, random_weight(rows, rows))


WORK: dict[str, Callable[[], Callable[[], object]]] = {
    "768 x 768, group 64": partial(layers, 1, 768, 768, 64),
    "4096 x 4096, group 128": partial(layers, 1, 4096, 4096, 128),
    "11008 x 4096, group 128": partial(layers, 1, 11008, 4096, 128),
    "4096 x 11008, group 128": partial(layers, 1, 4096, 11008, 128),
    "64 layers of 384 x 384, group 64": partial(layers, 64, 384, 384, 64),
    "64 layers of 1536 x 384, group 64": partial(layers, 64, 1536, 384, 64),
    "768 x 768, group 64, asymmetric": partial(layers, 1, 768, 768, 64, symmetric=False),
    "768 x 768, group 64, activation order": partial(layers, 1, 768, 768, 64, column_order="activation"),
    "768 x 768, group 64, dynamic scales": partial(layers, 1, 768, 768, 64, group_scales="dynamic"),
    "768 x 768, group 64, fast": partial(preset, "fast", 768, 64),
    "768 x 768, group 64, best": partial(preset, "best", 768, 64),
    "2048 x 2048, group 128, fast": partial(preset, "fast", 2048, 128),
    "2048 x 2048, group 128, best": partial(preset, "best", 2048, 128),
    "rounding to nearest, 4096 x 4096": partial(rounding, 4096),
    "Hessian, 768 inputs, 64 tokens": partial(batch, 64, 768),
    "Hessian, 768 inputs, 1536 tokens": partial(batch, 1536, 768),
    "Hessian, 768 inputs, 1536 tokens, bfloat16": partial(batch, 1536, 768, torch.bfloat16),
    "Hessian, 4096 inputs, 8192 tokens": partial(batch, 8192, 4096),
}


def serve() -> None:
    """Answers each name of a piece of work on standard input with the seconds that it took."""
    prepared = ""
    run: Callable[[], object] = int
    for line in sys.stdin:
        name = line.strip()
        if name != prepared:
            prepared, run = name, WORK[name]()
            run()
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


class Side:
    """A process that runs the work with the package of one clone."""

    def __init__(self, clone: Path, threads: int) -> None:
        paths = os.pathsep.join([str(clone / "src"), str(ROOT)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed.against", WORKER],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self._questions = cast("IO[str]", self._process.stdin)
        self._answers = cast("IO[str]", self._process.stdout)

    def seconds(self, name: str) -> float:
        """The time of one run of a piece of work."""
        time.sleep(PAUSE_SECONDS)
        print(name, file=self._questions, flush=True)
        answer = self._answers.readline()
        if not answer:
            raise SystemExit(f"the process of a clone ended with {self._process.wait()} during {name}")
        return float(answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def compare(name: str, other: Side, own: Side, seconds: float) -> dict[str, Any]:
    """Both sides in turn; which one is first changes with every turn."""
    times: dict[Side, list[float]] = {other: [], own: []}
    for side in times:
        side.seconds(name)
    end = time.perf_counter() + seconds
    while len(times[own]) < MOST_CALLS and (len(times[own]) < LEAST_CALLS or time.perf_counter() < end):
        for side in (other, own) if len(times[own]) % 2 else (own, other):
            times[side].append(side.seconds(name))
    return {
        "work": name,
        "calls": len(times[own]),
        "other_seconds": statistics.median(times[other]),
        "seconds": statistics.median(times[own]),
        "other_fastest": min(times[other]),
        "fastest": min(times[own]),
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The table of ratios."""
    rows = [
        [
            row["work"],
            milliseconds(row["other_seconds"]),
            milliseconds(row["seconds"]),
            f"**{row['seconds'] / row['other_seconds']:.2f}**",
            f"{row['fastest'] / row['other_fastest']:.2f}",
            str(row["calls"]),
        ]
        for row in results["rows"]
    ]
    commit = results["other_commit"]
    header = ["work", f"{commit}, ms", f"{results['commit']}, ms", "ratio", "ratio of the shortest", "calls of each"]
    return (
        f"Median times of two processes that take turns: commit {commit} and {results['commit']}.\n\n"
        f"{table(header, rows)}\n\n{machine_line(results)}\n"
    )


def commit_of(clone: Path) -> str:
    """The short name of the commit of a clone."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Compares, or answers as one of the two sides."""
    if sys.argv[1:] == [WORKER]:
        serve()
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clone", type=Path, help="a clone of the project with a built package below src")
    parser.add_argument("--seconds", type=float, default=20, help="min time for each row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=list(WORK), metavar="WORK", default=list(WORK))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    other, own = (Side(clone.resolve(), options.threads) for clone in (options.clone, ROOT))
    try:
        rows = [compare(name, other, own, options.seconds) for name in tqdm(options.only)]
    finally:
        other.close()
        own.close()
    results = {
        "command": "scripts/benchmark against CLONE",
        "commit": commit_of(ROOT),
        "other_commit": commit_of(options.clone),
        "machine": machine(options.threads),
        "versions": versions(),
        "rows": rows,
    }
    write_results(results, markdown(results), options.output, "against")


if __name__ == "__main__":
    main()
