"""Compares miniquant with other implementations of GPTQ on the same weights and the same inputs.

Each implementation runs in a process of its own (peers/run_*.py), the peers in their own virtual environment; all read
W and X from one file. They take turns, stage by stage, with torch.mm in between; the shortest time of each counts. A
turn is one run, or as many runs as fit into a quarter of a second: the first run after another process is slowed by
that process's spinning threads and by caches full of its data. The quantized weights are scored here, all by the same
formula: tr(E H E^T) / tr(W H W^T) in float64, E = W - dequantized, H = X X^T / n without a ridge.

Writes peers.json, and peers.md with the same figures as tables, into benchmarks/results. With --quick only the smaller
layer is measured, and the files go into build/benchmarks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Self

import miniquant
from benchmarks.common.measuring import (
    RESULTS,
    ROOT,
    SCRATCH,
    command_line,
    correlated_inputs,
    gptq_flops,
    hessian_flops,
    machine,
    machine_line,
    milliseconds,
    product_flops,
    random_weight,
    versions,
    write_results,
)
from benchmarks.common.tables import table
from benchmarks.peers.runner import Problem, timed

PEERS_VENV = ROOT / "build" / "peers-venv"
BATCH_TOKENS = 512
TURN_SECONDS = 0.25
SHOWN_LINES_OF_A_FAILURE = 15


class Case(NamedTuple):
    """A layer's sizes; 4 bits, symmetric."""

    rows: int
    columns: int
    group_size: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}, group {self.group_size}, {self.tokens} tokens"


class Contender(NamedTuple):
    """A row of the table: a runner and its options."""

    name: str
    runner: str
    options: dict[str, Any]


QUICK = [Case(768, 768, 64, 1536)]
FULL = [*QUICK, Case(4096, 4096, 128, 8192)]
OURS = "miniquant"
CONTENDERS = [
    Contender(OURS, OURS, {}),
    Contender("miniquant, activation order", OURS, {"column_order": "activation"}),
    Contender("miniquant, full range", OURS, {"full_range": True}),
    Contender('miniquant, preset "fast"', OURS, miniquant.preset("fast")),
    Contender('miniquant, preset "best"', OURS, miniquant.preset("best")),
    Contender("llm-compressor", "llm_compressor", {}),
    Contender("neural-compressor", "neural_compressor", {}),
]


class RunnerFailedError(RuntimeError):
    """A runner ended; the message has the last lines of its output."""


class Runner:
    """A process that serves the requests of peers/runner.py."""

    def __init__(self, name: str, python: Path, problem: Path, threads: int) -> None:
        self._name = name
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        ours, theirs = os.pipe()
        self._answers = os.fdopen(ours)
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.peers.run_{name}", problem, str(threads), str(theirs)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=self._said,
            text=True,
            pass_fds=[theirs],
        )
        os.close(theirs)
        self.version = str(self._answer()["version"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        with self._said, self._answers:
            self._process.communicate()

    def request(self, stage: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and returns the answer."""
        requests = cast("IO[str]", self._process.stdin)
        try:
            requests.write(json.dumps({"stage": stage, **arguments}) + "\n")
            requests.flush()
        except BrokenPipeError:
            pass  # _answer reports that the process has ended
        return self._answer()

    def seconds(self, stage: str, **arguments: Any) -> float:
        """The time of a stage."""
        return float(self.request(stage, **arguments)["seconds"])

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            status = self._process.wait()
            self._said.seek(0)
            last = self._said.read().decode(errors="replace").splitlines()[-SHOWN_LINES_OF_A_FAILURE:]
            raise RunnerFailedError(f"the runner of {self._name} ended with {status}:\n  " + "\n  ".join(last))
        return cast("dict[str, Any]", json.loads(line))


class Score:
    """The relative loss of dequantized weights, in float64."""

    def __init__(self, weight: Tensor, batches: Tensor) -> None:
        inputs = batches.flatten(0, 1).double()
        self._weight = weight.double()
        self._hessian = inputs.T @ inputs / inputs.shape[0]
        self._whole = self._form(self._weight)

    def _form(self, error: Tensor) -> float:
        return float(((error @ self._hessian) * error).sum())

    def __call__(self, dequantized: Tensor) -> float:
        """tr(E H E^T) / tr(W H W^T)."""
        return self._form(self._weight - dequantized.double()) / self._whole


def turn(call: Callable[[], float]) -> float:
    """The shortest time of the runs of one turn; `call` runs once and returns the time it took."""
    fastest, spent = float("inf"), 0.0
    while spent < TURN_SECONDS:
        seconds = call()
        spent += seconds
        fastest = min(fastest, seconds)
    return fastest


def batches_of(case: Case) -> Tensor:
    """Inputs [batches, tokens, K]; one batch if the tokens cannot be divided into whole batches."""
    tokens = BATCH_TOKENS if case.tokens % BATCH_TOKENS == 0 else case.tokens
    return correlated_inputs(case.tokens, case.columns).reshape(-1, tokens, case.columns)


def compare(
    case: Case, contenders: Sequence[Contender], pythons: Mapping[str, Path], threads: int, repeats: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """One case's figures, and the versions of the implementations."""
    problem = Problem(random_weight(case.rows, case.columns), batches_of(case), 4, case.group_size, 0.01, 128)
    inputs = problem.batches.flatten(0, 1)
    square, same = torch.empty(case.columns, case.columns), torch.empty_like(problem.weight)
    names = dict.fromkeys(contender.runner for contender in contenders)
    calls = len(names) + (repeats + 1) * (len(names) + len(contenders) + 2) + len(contenders)
    with (
        ExitStack() as stack,
        tqdm(total=calls, unit="call", desc=str(case), disable=None, leave=False) as progress,
    ):
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        problem.save(folder / "problem.pt")
        runners: dict[str, Runner] = {}
        for name in names:
            progress.set_postfix_str(f"starting {name}")
            runners[name] = stack.enter_context(Runner(name, pythons[name], folder / "problem.pt", threads))
            progress.update()

        def shortest(calls: Mapping[str, Callable[[], float]]) -> dict[str, float]:
            """The shortest time in `repeats` rounds of turns, after one round of warm-up."""
            fastest = dict.fromkeys(calls, float("inf"))
            for repeat in range(repeats + 1):
                for name, call in calls.items():
                    progress.set_postfix_str(name)
                    seconds = turn(call)
                    fastest[name] = min(fastest[name], seconds) if repeat > 0 else float("inf")
                    progress.update()
            return fastest

        def hessian_by(name: str) -> Callable[[], float]:
            return lambda: runners[name].seconds("hessian")

        def quantize_by(contender: Contender) -> Callable[[], float]:
            return lambda: runners[contender.runner].seconds("quantize", options=contender.options)

        hessian = shortest(
            {"torch.mm": lambda: timed(lambda: torch.mm(inputs.T, inputs, out=square))[0]}
            | {name: hessian_by(name) for name in names}
        )
        quantize = shortest(
            {"torch.mm": lambda: timed(lambda: torch.mm(problem.weight, square, out=same))[0]}
            | {contender.name: quantize_by(contender) for contender in contenders}
        )
        score = Score(problem.weight, problem.batches)
        losses = {}
        for contender in contenders:
            progress.set_postfix_str(f"loss of {contender.name}")
            # A runner with several contenders holds the result of its last one, so it quantizes again.
            runners[contender.runner].request("quantize", options=contender.options)
            runners[contender.runner].request("save", path=str(folder / "dequantized.pt"))
            losses[contender.name] = score(torch.load(folder / "dequantized.pt", weights_only=True))
            progress.update()
        found = {name: runner.version for name, runner in runners.items()}

    figures = {
        **case._asdict(),
        "batch_tokens": problem.batches.shape[1],
        "hessian_limit_seconds": hessian["torch.mm"]
        * hessian_flops(case.tokens, case.columns)
        / product_flops(case.columns, case.tokens, case.columns),
        "quantize_limit_seconds": quantize["torch.mm"]
        * gptq_flops(case.rows, case.columns)
        / product_flops(case.rows, case.columns, case.columns),
        "contenders": [
            {
                "name": contender.name,
                "options": contender.options,
                "hessian_seconds": hessian[contender.runner],
                "quantize_seconds": quantize[contender.name],
                "relative_loss": losses[contender.name],
            }
            for contender in contenders
        ],
    }
    return figures, found


def case_table(case: Mapping[str, Any]) -> str:
    """The table of one case; ratios are relative to the first row."""
    ours = case["contenders"][0]
    rows = []
    for line in case["contenders"]:
        cells = [line["name"]]
        for stage in ("hessian_seconds", "quantize_seconds"):
            ratio = line[stage] / ours[stage]
            cells += [milliseconds(line[stage]), f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"]
        rows.append([*cells, f"{line['relative_loss']:.3e}", f"{line['relative_loss'] / ours['relative_loss']:.3f}"])
    limits = [milliseconds(case[f"{stage}_limit_seconds"]) for stage in ("hessian", "quantize")]
    ratios = [f"{case[f'{stage}_limit_seconds'] / ours[f'{stage}_seconds']:.2f}" for stage in ("hessian", "quantize")]
    rows.append(["limit: torch.mm's rate", limits[0], ratios[0], limits[1], ratios[1], "", ""])
    name = str(Case(*(case[field] for field in Case._fields)))
    return table([name, "Hessian, ms", "ratio", "quantize, ms", "ratio", "loss", "ratio"], rows)


def to_markdown(results: Mapping[str, Any]) -> str:
    """The results as tables."""
    head = (
        "4 bits, symmetric, natural order, ridge 0.01 unless a line says else; the shortest of "
        f"{results['repeats']} turns. Hessian: from inputs, {BATCH_TOKENS} tokens at a time. Quantize: from W "
        "and H to codes. Loss: tr(E H E^T) / tr(W H W^T), H without the ridge. Ratios are to the first line. The "
        "peers' codes have 16 levels with the scale max|w| / 7.5, the first line's 15 with max|w| / 7; llm-compressor "
        "is handed its scales, neural-compressor takes them as it goes."
    )
    return "\n\n".join([head, *(case_table(case) for case in results["cases"]), machine_line(results)]) + "\n"


def case_argument(text: str) -> Case:
    """N,K,GROUP,TOKENS."""
    try:
        case = Case(*(int(part) for part in text.split(",")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected N,K,GROUP,TOKENS, but got {text}") from error
    if min(case) < 1 or case.columns % case.group_size != 0:
        raise argparse.ArgumentTypeError(f"expected positive sizes and whole groups, but got {text}")
    return case


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares, writes, prints."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the smaller layer only")
    parser.add_argument("--cases", nargs="+", type=case_argument, metavar="N,K,GROUP,TOKENS", help="other layers")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count; default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--peers-venv", type=Path, default=PEERS_VENV, help="default: build/peers-venv")
    parser.add_argument("--output", type=Path, help="the folder to write into")
    given = parser.parse_args(arguments)
    if min(given.repeats, given.threads) < 1:
        parser.error("expected --repeats and --threads to be at least 1")
    peers_python = given.peers_venv.absolute() / "bin" / "python"
    if not os.access(peers_python, os.X_OK):
        parser.error(
            f"no environment for the peers in {given.peers_venv}: run scripts/benchmark peers, which makes it in "
            f"build/peers-venv, or make one with `benchmarks/peers/setup {given.peers_venv}`"
        )

    torch.set_num_threads(given.threads)
    pythons = dict.fromkeys((contender.runner for contender in CONTENDERS), peers_python.absolute())
    pythons[OURS] = Path(sys.executable)
    cases = []
    implementations: dict[str, str] = {}
    for case in given.cases or (QUICK if given.quick else FULL):
        try:
            figures, implementations = compare(case, CONTENDERS, pythons, given.threads, given.repeats)
        except RunnerFailedError as error:
            raise SystemExit(f"compare_peers: {error}") from error
        cases.append(figures)
    results = {
        "command": command_line("scripts/benchmark", "peers"),
        "machine": machine(given.threads),
        "versions": versions() | implementations,
        "repeats": given.repeats,
        "cases": cases,
    }
    output = given.output or (SCRATCH if given.quick or given.cases else RESULTS)
    write_results(results, to_markdown(results), output, "peers")


if __name__ == "__main__":
    main()
