"""Times gptq, and torch.mm with as many operations, in a process that shares its processors with another program.

Used by benchmarks.speed. `python -m benchmarks.speed.shared N K GROUP THREADS SECONDS` prints the median time of a call
of each, in seconds, as JSON. `python -m benchmarks.speed.shared load THREADS` is the other program, which multiplies
matrices until it is killed.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

import miniquant
from benchmarks.common.measuring import gptq_flops, product_flops, random_weight

LOAD = "load"
LEAST_CALLS = 3


def multiply_forever(threads: int) -> None:
    """Runs the other program."""
    torch.set_num_threads(threads)
    matrix = random_weight(768, 768)
    while True:
        torch.mm(matrix, matrix)


def median_seconds(call: Callable[[], object], seconds: float) -> float:
    """The median time of at least LEAST_CALLS calls, after one call of warm-up."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Runs one of the two programs."""
    if sys.argv[1] == LOAD:
        multiply_forever(int(sys.argv[2]))
    rows, columns, group_size, threads = (int(argument) for argument in sys.argv[1:5])
    seconds = float(sys.argv[5])
    torch.set_num_threads(threads)
    weight = random_weight(rows, columns)
    inputs = torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(0))
    accumulator = miniquant.HessianAccumulator(columns)
    accumulator.update(inputs)
    hessian = accumulator.hessian()
    # One product with as many operations as gptq.
    width = max(1, round(gptq_flops(rows, columns) / product_flops(rows, columns, 1)))
    right = random_weight(columns, width)
    print(
        json.dumps(
            {
                "seconds": median_seconds(lambda: miniquant.gptq(weight, hessian, group_size=group_size), seconds),
                "product_seconds": median_seconds(lambda: torch.mm(weight, right), seconds),
            }
        )
    )


if __name__ == "__main__":
    main()
