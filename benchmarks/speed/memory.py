"""Prints the memory, in bytes, that one call of gptq takes beyond its arguments and its results, as JSON.

benchmarks.speed runs it in a process of its own, with the arguments N K GROUP and the options as JSON. It measures the
high-water mark of the resident set, which Linux lets a process reset. That mark is exact to 0.8 MB on two CPUs: Linux
counts pages of memory per CPU and adds them up in batches of 32 pages, or of two for each CPU if that is more.
"""

import json
import os
import sys
from pathlib import Path

import torch

import miniquant
from benchmarks.common.measuring import random_weight

# glibc reads these when a process starts. It then returns blocks of more than 64 KiB to the system as soon as they are
# freed; otherwise a call could reuse memory of earlier calls, which would not be counted.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def resident_bytes(field: str) -> int:
    """The size of VmRSS, the resident set, or of VmHWM, its max so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def decaying_hessian(columns: int) -> torch.Tensor:
    """H_ij = 2^-|i - j|: well conditioned, so float32 is enough."""
    index = torch.arange(columns, dtype=torch.float32)
    return torch.exp2(-(index[:, None] - index).abs_())


def main() -> None:
    """Makes the layer, calls gptq once."""
    rows, columns, group_size = (int(argument) for argument in sys.argv[1:4])
    options = json.loads(sys.argv[4])
    if missing := {name for name, value in ENVIRONMENT.items() if os.environ.get(name) != value}:
        raise SystemExit(f"benchmarks.speed.memory: expected benchmarks.speed to set {', '.join(sorted(missing))}")
    weight, hessian = random_weight(rows, columns), decaying_hessian(columns)
    # A first call starts the threads and makes other allocations that happen only once.
    miniquant.gptq(random_weight(64, 64), decaying_hessian(64), group_size=32, **options)

    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    result = miniquant.gptq(weight, hessian, group_size=group_size, **options)
    results = sum(part.nbytes for part in result)
    print(json.dumps({"extra_bytes": resident_bytes("VmHWM") - before - results}))


if __name__ == "__main__":
    main()
