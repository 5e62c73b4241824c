"""How benchmarks.peers drives one implementation: a process that times one stage at each request.

A runner is started with the path of the problem, the number of threads and the number of a file descriptor. Each line
of its standard input is a request and is answered by one line there, both JSON; standard output is left to what
libraries print.

    {"stage": "hessian"}                         accumulates the Hessian          {"seconds": ...}
    {"stage": "quantize", "options": {...}}      from weight and Hessian to codes {"seconds": ...}
    {"stage": "save", "path": "..."}             writes the last dequantized weight, [N, K]    {}

The first line that it writes, unasked, is {"version": ...}: the implementation is loaded. It imports torch and the
standard library only, since it runs in the peers' environment, too.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Problem(NamedTuple):
    """What is to be quantized, and how."""

    weight: Tensor  # [N, K]
    batches: Tensor  # [batches, tokens, K]
    bits: int
    group_size: int
    ridge: float
    block_size: int

    def save(self, path: Path) -> None:
        """Writes what `load` reads."""
        torch.save(self._asdict(), path)

    @classmethod
    def load(cls, path: Path) -> "Problem":
        """A problem from its file."""
        return cls(**torch.load(path, weights_only=True))


class Implementation(Protocol):
    """One implementation of GPTQ; symmetric grid, and columns in natural order unless options say else."""

    version: str

    def hessian(self) -> Any:
        """The Hessian of all batches, taken one by one, as the implementation keeps it."""

    def quantizer(self, hessian: Any, options: dict[str, Any]) -> Callable[[], Any]:
        """What goes from weight and Hessian to codes; copies of what it overwrites are made here."""

    def dequantized(self, result: Any) -> Tensor:
        """The weight [N, K] that a quantizer's result stands for."""


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that a call took, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def serve(make: Callable[[Problem], Implementation]) -> None:
    """Answers requests until standard input ends."""
    path, threads, descriptor = sys.argv[1:]
    answers = os.fdopen(int(descriptor), "w", buffering=1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")

    torch.set_num_threads(int(threads))
    with torch.no_grad():
        implementation = make(Problem.load(Path(path)))
        answer({"version": implementation.version})
        hessian: Any = None
        result: Any = None
        for line in sys.stdin:
            request = json.loads(line)
            if request["stage"] == "hessian":
                seconds, hessian = timed(implementation.hessian)
                answer({"seconds": seconds})
            elif request["stage"] == "quantize":
                seconds, result = timed(implementation.quantizer(hessian, request["options"]))
                answer({"seconds": seconds})
            else:
                torch.save(implementation.dequantized(result).float().contiguous(), request["path"])
                answer({})
