"""Times the path from inputs to codes relative to a matrix product on the same machine.

Every time is the shortest of several, taken in turn with torch.mm at the same sizes (common/measuring.py defines the
limit). Writes speed.json, speed.md with the same figures as tables, and growth.png (time against K) into
benchmarks/results. With --quick smaller layers are measured, and the files go into build/benchmarks.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import miniquant
from benchmarks.common.measuring import (
    RESULTS,
    ROOT,
    SCRATCH,
    command_line,
    correlated_inputs,
    gptq_flops,
    hessian_flops,
    interleaved,
    machine,
    machine_line,
    milliseconds,
    product_flops,
    random_weight,
    versions,
    write_results,
)
from benchmarks.common.tables import table
from benchmarks.speed import memory, shared

Options = dict[str, Any]
Row = dict[str, Any]
# Max tokens of the Hessians; their number does not affect the time of gptq.
MOST_TOKENS = 2048


class Layer(NamedTuple):
    """The size of a weight [rows, columns]; `copies` of them are quantized one after the other."""

    rows: int
    columns: int
    group_size: int
    copies: int = 1

    def __str__(self) -> str:
        several = f"{self.copies} layers of " if self.copies > 1 else ""
        return f"{several}{self.rows} x {self.columns}, group {self.group_size}"


class Inputs(NamedTuple):
    """The size of a batch [tokens, columns]."""

    tokens: int
    columns: int

    def __str__(self) -> str:
        return f"{self.columns} inputs, {self.tokens} tokens"


class Plan(NamedTuple):
    """The sizes that are measured."""

    layers: Sequence[Layer]
    inputs: Sequence[Inputs]
    option_layers: Sequence[Layer]
    memory_layers: Sequence[Layer]
    thread_layers: Sequence[Layer]
    thread_inputs: Sequence[Inputs]
    shared_layers: Sequence[Layer]
    growth: Sequence[int]  # K of square layers
    growth_group_size: int


FULL = Plan(
    layers=[
        Layer(768, 768, 64),
        Layer(4096, 4096, 128),
        Layer(11008, 4096, 128),
        Layer(4096, 11008, 128),
        Layer(384, 384, 64, copies=64),
        Layer(1536, 384, 64, copies=64),
    ],
    inputs=[Inputs(1536, 768), Inputs(8192, 4096)],
    option_layers=[Layer(768, 768, 64), Layer(4096, 4096, 128)],
    memory_layers=[Layer(4096, 4096, 128), Layer(11008, 4096, 128), Layer(4096, 11008, 128)],
    thread_layers=[Layer(768, 768, 64), Layer(4096, 4096, 128)],
    thread_inputs=[Inputs(8192, 4096)],
    shared_layers=[Layer(576, 576, 64)],
    growth=[512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192],
    growth_group_size=128,
)
QUICK = Plan(
    layers=[Layer(768, 768, 64), Layer(384, 384, 64, copies=16), Layer(1536, 384, 64, copies=16)],
    inputs=[Inputs(1536, 768)],
    option_layers=[Layer(768, 768, 64)],
    memory_layers=[Layer(1536, 1536, 128)],
    thread_layers=[Layer(768, 768, 64)],
    thread_inputs=[Inputs(1536, 768)],
    shared_layers=[Layer(576, 576, 64)],
    growth=[256, 512, 1024],
    growth_group_size=128,
)
FULL_SECONDS = 2.0
# The scheduler places the threads of each process differently, so several processes are measured.
SHARED_PROCESSES = 8
QUICK_SECONDS = 0.2

# Options that are compared with the plain case: 4 bits, symmetric, static scales, natural order.
OPTIONS: dict[str, Options] = {
    "activation order": {"column_order": "activation"},
    "group order": {"column_order": "group"},
    "dynamic scales": {"group_scales": "dynamic"},
    "asymmetric": {"symmetric": False},
    "full range": {"full_range": True},
    "least squares": {"scale_method": "mse"},
    'preset "fast"': miniquant.preset("fast"),
    'preset "best"': miniquant.preset("best"),
    **{f"{bits} bits": {"bits": bits} for bits in (2, 3, 5, 6, 7, 8)},
}
MEMORY_OPTIONS: dict[str, Options] = {
    "plain": {},
    **{name: OPTIONS[name] for name in ("activation order", 'preset "best"')},
}


def hessian_of(columns: int) -> Tensor:
    """The Hessian [columns, columns] of correlated inputs."""
    accumulator = miniquant.HessianAccumulator(columns)
    accumulator.update(correlated_inputs(min(2 * columns, MOST_TOKENS), columns))
    return accumulator.hessian()


def timed_row(flops: float, done: float, seconds: Mapping[str, float], **what: Any) -> Row:
    """The time of the work, and the limit from a product of `done` multiplications and additions."""
    return {
        **what,
        "flops": flops,
        "product_flops": done,
        "seconds": seconds["work"],
        "product_seconds": seconds["product"],
        "limit_seconds": seconds["product"] * flops / done,
    }


def measure_layer(layer: Layer, seconds: float) -> Row:
    """Times gptq for one layer, or for several of one size, whose data are not in the caches when they start."""
    weights = [random_weight(layer.rows, layer.columns, seed) for seed in range(layer.copies)]
    hessian = hessian_of(layer.columns)
    hessians = [hessian.clone() for _ in weights]
    out = torch.empty(layer.rows, layer.columns)

    def product() -> None:
        for weight, hessian in zip(weights, hessians, strict=True):
            torch.mm(weight, hessian, out=out)

    def work() -> None:
        for weight, hessian in zip(weights, hessians, strict=True):
            miniquant.gptq(weight, hessian, group_size=layer.group_size)

    return timed_row(
        layer.copies * gptq_flops(layer.rows, layer.columns),
        layer.copies * product_flops(layer.rows, layer.columns, layer.columns),
        interleaved({"product": product, "work": work}, seconds),
        **layer._asdict(),
    )


def measure_inputs(inputs: Inputs, dtype: torch.dtype, seconds: float) -> Row:
    """Times hessian_update_ for a batch; the product is in float32, the dtype of the sum."""
    batch = correlated_inputs(inputs.tokens, inputs.columns)
    given = batch.to(dtype)
    hessian = torch.zeros(inputs.columns, inputs.columns)
    out = torch.empty_like(hessian)
    return timed_row(
        hessian_flops(inputs.tokens, inputs.columns),
        product_flops(inputs.columns, inputs.tokens, inputs.columns),
        interleaved(
            {
                "product": lambda: torch.mm(batch.T, batch, out=out),
                "work": lambda: miniquant.hessian_update_(hessian, given),
            },
            seconds,
        ),
        **inputs._asdict(),
        dtype=str(dtype).removeprefix("torch."),
    )


def measure_options(layer: Layer, seconds: float) -> Row:
    """Times every option in turn with the plain case."""
    weight, hessian = random_weight(layer.rows, layer.columns), hessian_of(layer.columns)

    def run_with(options: Options) -> Callable[[], object]:
        return lambda: miniquant.gptq(weight, hessian, group_size=layer.group_size, **options)

    times = interleaved({name: run_with(options) for name, options in {"plain": {}, **OPTIONS}.items()}, seconds / 4)
    plain = times.pop("plain")
    rows = [
        {"name": name, "options": OPTIONS[name], "seconds": taken, "relative": taken / plain}
        for name, taken in times.items()
    ]
    return {**layer._asdict(), "plain_seconds": plain, "options": rows}


def measure_memory(layer: Layer, name: str) -> Row:
    """The peak memory of a process that calls gptq once."""
    sizes = [str(size) for size in layer[:3]]
    run = subprocess.run(
        [sys.executable, "-m", memory.__name__, *sizes, json.dumps(MEMORY_OPTIONS[name])],
        check=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **memory.ENVIRONMENT},
    )
    extra = json.loads(run.stdout)["extra_bytes"] / 4
    bound = layer.columns**2 + layer.rows * layer.columns / 4
    return {**layer._asdict(), "name": name, "extra_floats": extra, "bound_floats": bound}


def measure_threads(what: Layer | Inputs, threads: int, seconds: float) -> Row:
    """Times the work and the product with one thread and with all threads."""
    rows = {}
    for count in (1, threads):
        torch.set_num_threads(count)
        if isinstance(what, Layer):
            rows[count] = measure_layer(what, seconds)
        else:
            rows[count] = measure_inputs(what, torch.float32, seconds)
    return {
        "work": "gptq" if isinstance(what, Layer) else "hessian",
        **what._asdict(),
        "threads": threads,
        **{f"{key}_1_thread": rows[1][key] for key in ("seconds", "product_seconds")},
        **{key: rows[threads][key] for key in ("seconds", "product_seconds")},
    }


def measure_shared(layer: Layer, threads: int, seconds: float) -> Row:
    """Times one process with one thread alone, then several in turn while a program with as many threads runs."""
    program = [sys.executable, "-m", shared.__name__]

    def times(count: int) -> Row:
        arguments = [str(value) for value in (*layer[:3], count, seconds / 2)]
        run = subprocess.run([*program, *arguments], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        row: Row = json.loads(run.stdout)
        return row

    alone = times(1)
    with subprocess.Popen([*program, shared.LOAD, str(threads)], cwd=ROOT) as load:
        try:
            beside = [times(threads) for _ in range(SHARED_PROCESSES)]
        finally:
            load.kill()
    return {
        **layer._asdict(),
        "threads": threads,
        "processes": SHARED_PROCESSES,
        **{f"{key}_1_thread": value for key, value in alone.items()},
        **{key: [row[key] for row in beside] for key in alone},
    }


class Task(NamedTuple):
    """A figure to measure: its table, its label in the progress bar, and the call."""

    section: str
    label: str
    run: Callable[[], Row]


def tasks(plan: Plan, threads: int, seconds: float) -> Iterator[Task]:
    """All figures of a plan, in the order of the tables."""
    for layer in plan.layers:
        yield Task("layers", str(layer), partial(measure_layer, layer, seconds))
    for inputs in plan.inputs:
        for dtype in (torch.float32, torch.bfloat16):
            yield Task("hessian", str(inputs), partial(measure_inputs, inputs, dtype, seconds))
    for layer in plan.option_layers:
        yield Task("options", f"options, {layer}", partial(measure_options, layer, seconds))
    for layer in plan.memory_layers:
        for name in MEMORY_OPTIONS if layer is plan.memory_layers[0] else ["plain"]:
            yield Task("memory", f"memory, {layer}", partial(measure_memory, layer, name))
    if threads > 1:
        threaded: list[Layer | Inputs] = [*plan.thread_layers, *plan.thread_inputs]
        for what in threaded:
            yield Task("threads", f"threads, {what}", partial(measure_threads, what, threads, seconds))
        for layer in plan.shared_layers:
            yield Task("shared", f"shared, {layer}", partial(measure_shared, layer, threads, seconds))
    for columns in plan.growth:
        layer = Layer(columns, columns, plan.growth_group_size)
        yield Task("growth", f"growth, {layer}", partial(measure_layer, layer, seconds))


SECTIONS = ("layers", "hessian", "options", "memory", "threads", "shared", "growth")


def measure(plan: Plan, threads: int, seconds: float, sections: Sequence[str] = SECTIONS) -> dict[str, Any]:
    """All figures."""
    torch.set_num_threads(threads)
    figures: dict[str, list[Row]] = {section: [] for section in SECTIONS}
    chosen = [task for task in tasks(plan, threads, seconds) if task.section in sections]
    with tqdm(chosen, unit="figure", disable=None, leave=False) as progress:
        for task in progress:
            progress.set_postfix_str(task.label)
            figures[task.section].append(task.run())
            torch.set_num_threads(threads)
    return {
        "command": command_line("scripts/benchmark", "speed"),
        "machine": machine(threads),
        "versions": versions(),
    } | figures


def share(row: Row) -> str:
    """Limit / time."""
    return f"**{row['limit_seconds'] / row['seconds']:.0%}**"


def layer_of(row: Row) -> Layer:
    """A row's layer."""
    return Layer(*(row[field] for field in Layer._fields))


def timed_table(first: str, rows: Sequence[Row], name: Callable[[Row], str]) -> str:
    """A table of times and their limits."""
    lines = [[name(row), milliseconds(row["limit_seconds"]), milliseconds(row["seconds"]), share(row)] for row in rows]
    return table([first, "limit, ms", "time, ms", "limit / time"], lines)


def options_table(rows: Sequence[Row]) -> str:
    """A table with a row per option and a column per layer."""
    names = [option["name"] for option in rows[0]["options"]]
    return table(
        ["time relative to the plain case", *(str(layer_of(row)) for row in rows)],
        [
            [
                name,
                *(f"{option['relative']:.2f}" for row in rows for option in row["options"] if option["name"] == name),
            ]
            for name in names
        ],
    )


def memory_table(rows: Sequence[Row]) -> str:
    """A table of memory in MiB and relative to the bound."""
    lines = [
        [
            f"{layer_of(row)}, {row['name']}",
            f"{row['extra_floats'] * 4 / 2**20:,.1f}",
            f"{row['bound_floats'] * 4 / 2**20:,.1f}",
            f"**{row['extra_floats'] / row['bound_floats']:.2f}**",
        ]
        for row in rows
    ]
    return table(["memory beyond W, H and results", "MiB", "K² + N K / 4 floats, MiB", "ratio"], lines)


def threads_table(rows: Sequence[Row]) -> str:
    """A table of the speedups of the work and of the product."""

    def name(row: Row) -> str:
        if row["work"] == "gptq":
            return f"gptq, {layer_of(row)}"
        return f"Hessian, {Inputs(row['tokens'], row['columns'])}"

    lines = [
        [
            name(row),
            milliseconds(row["seconds_1_thread"]),
            milliseconds(row["seconds"]),
            f"**{row['seconds_1_thread'] / row['seconds']:.2f}**",
            f"{row['product_seconds_1_thread'] / row['product_seconds']:.2f}",
        ]
        for row in rows
    ]
    threads = rows[0]["threads"]
    return table(["work", "1 thread, ms", f"{threads} threads, ms", "speedup", "speedup of torch.mm"], lines)


def shared_table(rows: Sequence[Row]) -> str:
    """A table of the best and the worst process beside another program, relative to one thread's time alone."""
    lines = [
        [
            f"{work}, {layer_of(row)}",
            milliseconds(row[f"{key}_1_thread"]),
            milliseconds(min(row[key])),
            milliseconds(max(row[key])),
            f"**{max(row[key]) / row[f'{key}_1_thread']:.1f}**",
        ]
        for row in rows
        for work, key in (("gptq", "seconds"), ("torch.mm of as many operations", "product_seconds"))
    ]
    first = f"beside a program of {rows[0]['threads']} threads, {rows[0]['processes']} processes"
    return table([first, "1 thread alone, ms", "best process, ms", "worst, ms", "worst / 1 thread alone"], lines)


def to_markdown(results: Mapping[str, Any]) -> str:
    """The results as tables."""
    head = (
        "float32, 4 bits, symmetric, natural order unless a line says else. The limit is the time that torch.mm, at "
        "the same sizes and in turn with what is measured, would need for as many multiplications and additions: "
        "N K² + K³/3 for gptq, T K² for the Hessian."
    )
    parts = [head]
    if results["layers"]:
        parts.append(timed_table("gptq, N x K", results["layers"], lambda row: str(layer_of(row))))
    if results["hessian"]:
        parts.append(
            timed_table(
                "Hessian",
                results["hessian"],
                lambda row: f"{Inputs(row['tokens'], row['columns'])}, {row['dtype']}",
            )
        )
    if results["options"]:
        parts.append(options_table(results["options"]))
    if results["memory"]:
        parts.append(memory_table(results["memory"]))
    if results["threads"]:
        parts.append(threads_table(results["threads"]))
    if results["shared"]:
        parts.append(shared_table(results["shared"]))
    if results["growth"]:
        parts.append(timed_table("gptq, N = K", results["growth"], lambda row: str(row["columns"])))
    return "\n\n".join([*parts, machine_line(results)]) + "\n"


def plot_growth(rows: Sequence[Row], where: Mapping[str, Any], path: Path) -> None:
    """Plots the time of square layers against K, with the limit."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        columns = [row["columns"] for row in rows]
        axes.plot(columns, [row["limit_seconds"] for row in rows], "k--", linewidth=1, label="limit: torch.mm's rate")
        axes.plot(columns, [row["seconds"] for row in rows], "o-", color="tab:blue", markersize=4, label="gptq")
        for row in rows:
            axes.annotate(
                f"{row['limit_seconds'] / row['seconds']:.0%}",
                (row["columns"], row["seconds"]),
                textcoords="offset points",
                xytext=(-4, 6),
                ha="right",
                color="tab:blue",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(columns, [str(count) for count in columns], rotation=45)
        axes.set_xlabel("K = N, columns and rows of the weight")
        axes.set_ylabel("seconds")
        axes.set_title(f"4 bits, float32, {where['threads']} threads, {where['instruction_set']}: limit / time")
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes, prints."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller layers, less than a minute")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="some of the tables")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"min time for each figure; default: {FULL_SECONDS}, with --quick {QUICK_SECONDS}",
    )
    parser.add_argument("--output", type=Path, help="the folder to write into")
    given = parser.parse_args(arguments)
    if given.threads < 1:
        parser.error(f"argument --threads: expected at least 1, but got {given.threads}")
    seconds = given.seconds if given.seconds is not None else QUICK_SECONDS if given.quick else FULL_SECONDS
    if not (math.isfinite(seconds) and seconds > 0):
        parser.error(f"argument --seconds: expected a positive number, but got {seconds}")

    results = measure(QUICK if given.quick else FULL, given.threads, seconds, given.only)
    output = given.output or (SCRATCH if given.quick or given.only != SECTIONS else RESULTS)
    write_results(results, to_markdown(results), output, "speed")
    if results["growth"]:
        plot_growth(results["growth"], results["machine"], output / "growth.png")


if __name__ == "__main__":
    main()
