"""Intel's neural-compressor: GPTQ.add_batch and GPTQ.fasterquant."""

import logging
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from neural_compressor.torch.algorithms.weight_only.gptq import GPTQ
from torch import Tensor

from benchmarks.peers.runner import Problem, serve


class NeuralCompressor:
    """Scales are computed from the updated weights, just before each group is quantized."""

    version = version("neural_compressor_pt")

    def __init__(self, problem: Problem) -> None:
        # neural-compressor logs the time of each call.
        logging.disable(logging.INFO)
        self._problem = problem
        rows, columns = problem.weight.shape
        self._layer = torch.nn.Linear(columns, rows, bias=False).requires_grad_(False)  # noqa: FBT003
        self._layer.weight.copy_(problem.weight)

    def hessian(self) -> Any:
        """The solver that holds the Hessian."""
        solver = GPTQ(self._layer, self._problem.weight.clone(), device="cpu")
        solver.quantizer.configure(
            {
                "dtype": "int",
                "bits": self._problem.bits,
                "group_size": self._problem.group_size,
                "sym": True,
                "perchannel": True,
                "mse": False,
                "use_double_quant": False,
                "double_quant_dtype": "int",
                "double_quant_bits": 8,
                "double_quant_group_size": 256,
                "double_quant_sym": True,
            }
        )
        for batch in self._problem.batches:
            solver.add_batch(batch, None)
        return solver

    def quantizer(self, hessian: Any, options: dict[str, Any]) -> Callable[[], Tensor]:
        """A call of fasterquant on copies, because it overwrites the weight and deletes the solver's Hessian."""
        if options:
            raise ValueError(f"no options of neural-compressor are compared, but got {options}")
        weight = self._problem.weight.clone()
        kept = hessian.H
        copied = kept.clone()

        def quantize() -> Tensor:
            hessian.H = copied
            *_, values = hessian.fasterquant(
                weight,
                blocksize=self._problem.block_size,
                percdamp=self._problem.ridge,
                groupsize=self._problem.group_size,
                act_order=False,
                static_groups=False,
            )
            hessian.H = kept
            result: Tensor = values
            return result

        return quantize

    def dequantized(self, result: Tensor) -> Tensor:
        """The result, which is dequantized already."""
        return result.reshape(self._problem.weight.shape)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    serve(NeuralCompressor)
