"""Times Hessians of 16-bit inputs relative to those of float32 inputs: what the CPU's unit for bfloat16 gives.

Writes units.json and units.md into benchmarks/results; the figures of other units that these files have stay there.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import miniquant
from benchmarks.common.measuring import (
    RESULTS,
    SCRATCH,
    correlated_inputs,
    interleaved,
    machine,
    machine_line,
    milliseconds,
    versions,
    write_results,
)
from benchmarks.common.tables import table

SIZES = ((4096, 8192), (4096, 2048), (1536, 2048), (768, 1536))
QUICK_SIZES = ((256, 512),)


def runs_of(columns: int, tokens: int) -> dict[str, Callable[[], object]]:
    """A batch of each dtype, with and without weights of tokens, and torch's own product."""
    inputs = correlated_inputs(tokens, columns)
    halves = inputs.bfloat16()
    powers = torch.exp2(torch.arange(tokens) % 8 - 4.0).double()
    accumulator = miniquant.HessianAccumulator(columns)

    def update(batch: Tensor, weights: Tensor | None = None) -> Callable[[], object]:
        return partial(accumulator.update, batch, token_weights=weights)

    split = miniquant.HessianAccumulator(columns, precision="bf16x3")
    return {
        "float32": update(inputs),
        "bfloat16": update(halves),
        "bfloat16, powers of two": update(halves, powers),
        "bfloat16, other weights": update(halves, powers * 1.1),
        "float16": update(inputs.half()),
        "float32, bf16x3": partial(split.update, inputs),
        "torch.mm": partial(torch.mm, halves.T, halves),
    }


def measure(columns: int, tokens: int, seconds: float) -> dict[str, Any]:
    """The shortest time of each run, in turn."""
    return {"columns": columns, "tokens": tokens, "seconds": interleaved(runs_of(columns, tokens), seconds)}


def markdown_of(results: Mapping[str, Any]) -> str:
    """The table of one unit."""
    rows = []
    for row in results["rows"]:
        seconds = row["seconds"]
        base = seconds["float32"]
        relative = [f"{seconds[name] / base:.2f}" for name in list(seconds) if name not in ("float32", "torch.mm")]
        rows.append(
            [
                f"{row['columns']} inputs, {row['tokens']} tokens",
                milliseconds(base),
                f"**{relative[0]}**",
                *relative[1:],
                f"{seconds['torch.mm'] / 2 / seconds['bfloat16']:.0%}",
            ]
        )
    header = [
        f"unit: {results['unit']}",
        "float32, ms",
        "bfloat16",
        "weights that are powers of two",
        "other weights",
        "float16",
        "float32, bf16x3",
        "rate against torch.mm",
    ]
    return f"{table(header, rows)}\n\n{machine_line(results)}\n"


def markdown(by_unit: Mapping[str, Any]) -> str:
    """The tables of all units."""
    intro = (
        "Time of a batch relative to the same batch in float32; the shortest of runs in turn. The last column is the "
        "rate of multiplications in bfloat16, of one triangle, relative to that of torch.mm in bfloat16."
    )
    return "\n".join([f"{intro}\n", *(markdown_of(by_unit[unit]) for unit in sorted(by_unit))])


def main() -> None:
    """Measures this machine's unit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2, help="min time for each figure")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    output = options.output or (SCRATCH if options.quick else RESULTS)
    unit = str(torch.ops.miniquant.bfloat16_unit())
    sizes = QUICK_SIZES if options.quick else SIZES
    results = {
        "command": "scripts/benchmark units",
        "unit": unit,
        "machine": machine(options.threads),
        "versions": versions(),
        "rows": [measure(*size, options.seconds) for size in tqdm(sizes)],
    }
    kept = output / "units.json"
    by_unit = json.loads(kept.read_text()) if kept.is_file() else {}
    by_unit[unit] = results
    write_results(by_unit, markdown(by_unit), output, "units")


if __name__ == "__main__":
    main()
