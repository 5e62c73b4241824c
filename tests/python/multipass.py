"""Sequential quantization by reruns: every layer's inputs from a forward pass of its own, and no hooks and no pauses.

What the paused walk is tested against. A function mode sees every product of an input with a weight, whichever module
makes it; the layer is told by the weight's memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from miniquant import HessianAccumulator, dequantize, gptq

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Reached(BaseException):
    def __init__(self, name: str, inputs: Tensor) -> None:
        super().__init__(name)
        self.name = name
        self.inputs = inputs


def unfolded(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """[B, positions, C * kernel elements]."""
    if x.dim() == 3:
        x, weight, stride, padding = x[:, :, None], weight[:, :, None], (1, *stride), (0, *padding)
    return functional.unfold(x, weight.shape[2:], stride=tuple(stride), padding=tuple(padding)).mT


class StopAtFirst(TorchFunctionMode):
    """Ends the forward pass where a weight is used that is still to be quantized."""

    def __init__(self, waiting: Mapping[int, str]) -> None:
        super().__init__()
        self.waiting = waiting  # address of the matrix: its name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        products: dict[Any, tuple[int, int]] = {
            functional.linear: (0, 1),
            torch.addmm: (1, 2),
            torch.conv1d: (0, 1),
            torch.conv2d: (0, 1),
            torch.Tensor.__matmul__: (0, 1),
            torch.Tensor.matmul: (0, 1),
        }
        if func in products and len(args) > max(products[func]):
            x, weight = (args[place] for place in products[func])
            name = self.waiting.get(weight.data_ptr())
            if name is not None:
                if func in (torch.conv1d, torch.conv2d):
                    x = unfolded(x, weight, args[3], args[4])
                raise Reached(name, x.clone())
        return func(*args, **kwargs)


def matrices(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """By a site's name, a view of its matrix, as stored."""
    found = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        if last.isdigit() and isinstance(parameter := _get(model, owner), nn.Parameter):
            found[name] = parameter.data[int(last)]
        else:
            found[name] = _get(model, f"{name}.weight").data
    return found


def _get(model: nn.Module, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value


def quantized(weight: Tensor, hessian: Tensor) -> Tensor:
    return dequantize(gptq(weight, hessian, bits=3, group_size=16, ridge=0.1))


def multipass(
    model: Any,
    batches: Sequence[Any],
    names: Sequence[str],
    *,
    masked: Callable[[str, int, Tensor], Tensor | None] = lambda *_: None,
) -> dict[str, Tensor]:
    """Quantizes layers one after another, in place.

    Args:
        model: whose experts, if any, are run one at a time.
        batches: keyword arguments.
        names: of layers; where batches come to different ones, the first here goes first.
        masked: of a layer, a batch and its inputs, the mask.

    Returns:
        The Hessians, by name, in the order in which layers were quantized.
    """
    hessians = {}
    waiting = matrices(model, names)
    while waiting:
        reached = []
        for number, batch in enumerate(batches):
            try:
                addresses = {matrix.data_ptr(): name for name, matrix in waiting.items()}
                with torch.no_grad(), StopAtFirst(addresses):
                    model(**batch)
            except Reached as at:
                reached.append((number, at.name, at.inputs))
        if not reached:
            break
        first = min((name for _, name, _ in reached), key=list(names).index)
        inputs = [(number, x) for number, name, x in reached if name == first]
        matrix = waiting.pop(first)
        columns = inputs[0][1].shape[-1]
        accumulator = HessianAccumulator(columns, halves=True)
        for number, x in inputs:
            accumulator.update(x, mask=masked(first, number, x))
        hessians[first] = accumulator.hessian()
        transposed = _is_stored_transposed(model, first)
        weight = matrix.T if transposed else matrix.flatten(1)
        values = quantized(weight.contiguous(), hessians[first])
        matrix.copy_(values.T if transposed else values.view(matrix.shape))
    return hessians


def _is_stored_transposed(model: nn.Module, name: str) -> bool:
    """Conv1D of transformers, and the experts of gpt-oss."""
    if name.rpartition(".")[2].isdigit() and "experts" in name:
        return "GptOss" in type(model).__name__
    return type(_get(model, name)).__name__ == "Conv1D"
