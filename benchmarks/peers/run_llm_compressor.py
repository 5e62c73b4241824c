"""llm-compressor: accumulate_hessian and quantize_weight of its GPTQ modifier."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian
from torch import Tensor

from benchmarks.peers.runner import Problem, serve


class LlmCompressor:
    """Scales are computed from the original weight and passed in, so their time is not counted."""

    version = version("llmcompressor")

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        rows, columns = problem.weight.shape
        self._layer = torch.nn.Linear(columns, rows, bias=False).requires_grad_(False)  # noqa: FBT003
        self._layer.weight.copy_(problem.weight)
        self._arguments = QuantizationArgs(
            num_bits=problem.bits, symmetric=True, strategy="group", group_size=problem.group_size
        )
        groups = problem.weight.reshape(rows, -1, problem.group_size)
        self._scales, self._zero_points = calculate_qparams(groups.amin(-1), groups.amax(-1), self._arguments)

    def hessian(self) -> Tensor:
        """Adds batches with a leading dimension, as llm-compressor's hooks receive them."""
        total = make_empty_hessian(self._layer)
        count = torch.zeros(())
        for batch in self._problem.batches:
            total, count = accumulate_hessian(batch[None], self._layer, total, count)
        mean: Tensor = total / count
        return mean

    def quantizer(self, hessian: Tensor, options: dict[str, Any]) -> Callable[[], Tensor]:
        """A call of quantize_weight, which takes stacks of layers and overwrites its arguments."""
        if options:
            raise ValueError(f"no options of llm-compressor are compared, but got {options}")
        weights, hessians = self._problem.weight.clone()[None], hessian.clone()[None]

        def quantize() -> Tensor:
            values, _, rounded_to_nearest = quantize_weight(
                weights=weights,
                hessians=hessians,
                scale=self._scales[None],
                zero_point=self._zero_points[None],
                global_scale=None,
                quant_args=self._arguments,
                blocksize=self._problem.block_size,
                percdamp=self._problem.ridge,
            )
            if bool(torch.as_tensor(rounded_to_nearest).any()):
                raise RuntimeError("llm-compressor gave up on the Hessian and rounded to nearest")
            result: Tensor = values[0]
            return result

        return quantize

    def dequantized(self, result: Tensor) -> Tensor:
        """The result, which is dequantized already."""
        return result


if __name__ == "__main__":
    serve(LlmCompressor)
