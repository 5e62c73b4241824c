"""A runner of benchmarks.peers: a process that runs one implementation and times one stage per request.

A runner is started with the path of the problem, the number of threads and the number of a file descriptor. Each line
of its standard input is a request, which it answers with one line on that file descriptor; both are JSON. Standard
output is left to the messages of libraries.

    {"stage": "hessian"}                         accumulates the Hessian          {"seconds": ...}
    {"stage": "quantize", "options": {...}}      from weight and Hessian to codes {"seconds": ...}
    {"stage": "save", "path": "..."}             writes the last dequantized weight, [N, K]    {}

Before the first request it writes the line {"version": ...}, when the implementation is loaded. This module imports
torch and the standard library only, because it also runs in the peers' environment.
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
    """The weight and inputs to quantize, and the options."""

    weight: Tensor  # [N, K]
    batches: Tensor  # [batches, tokens, K]
    bits: int
    group_size: int
    ridge: float
    block_size: int

    def save(self, path: Path) -> None:
        """Writes a file that `load` reads."""
        torch.save(self._asdict(), path)

    @classmethod
    def load(cls, path: Path) -> "Problem":
        """Reads a problem from its file."""
        return cls(**torch.load(path, weights_only=True))


class Implementation(Protocol):
    """One implementation of GPTQ: symmetric grid, and columns in natural order unless options say otherwise."""

    version: str

    def hessian(self) -> Any:
        """The Hessian of all batches, added one by one, in the implementation's own form."""

    def quantizer(self, hessian: Any, options: dict[str, Any]) -> Callable[[], Any]:
        """A function that computes codes from weight and Hessian; copies of overwritten tensors are made here."""

    def dequantized(self, result: Any) -> Tensor:
        """The dequantized weight [N, K] of a quantizer's result."""


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """The time of a call in seconds, and its result."""
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
