"""miniquant as a runner, like its peers: options are keyword arguments of miniquant.gptq."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

import miniquant
from benchmarks.peers.runner import Problem, serve
from miniquant import GptqResult


class Miniquant:
    """The time includes the scales, which gptq computes."""

    version = miniquant.__version__

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def hessian(self) -> Tensor:
        """Updates an accumulator with each batch, then takes the mean."""
        accumulator = miniquant.HessianAccumulator(self._problem.weight.shape[1])
        for batch in self._problem.batches:
            accumulator.update(batch)
        return accumulator.hessian()

    def quantizer(self, hessian: Tensor, options: dict[str, Any]) -> Callable[[], GptqResult]:
        """A call of gptq, which does not change its arguments."""
        problem = self._problem
        return lambda: miniquant.gptq(
            problem.weight,
            hessian,
            bits=problem.bits,
            group_size=problem.group_size,
            ridge=problem.ridge,
            block_size=problem.block_size,
            **options,
        )

    def dequantized(self, result: GptqResult) -> Tensor:
        """The weight computed from codes and scales."""
        return miniquant.dequantize(result.codes, result.scales, result.zero_points, self._problem.group_size)


if __name__ == "__main__":
    serve(Miniquant)
