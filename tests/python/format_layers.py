"""Layers for the tests of checkpoint formats: every code of a grid, drawn at random, and small models."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

import miniquant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

KINDS = {
    "symmetric": {"symmetric": True, "full_range": False},
    "full range": {"symmetric": True, "full_range": True},
    "asymmetric": {"symmetric": False, "full_range": False},
}


def random_layer(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    kind: str = "symmetric",
    dtype: torch.dtype = torch.float16,
    lowest_zero: bool = True,
) -> miniquant.QuantizedWeight:
    """Codes of the whole range, the lowest and the highest among them; zero points, too, where the grid has them."""
    symmetric, full_range = KINDS[kind]["symmetric"], KINDS[kind]["full_range"]
    groups = 1 if group_size == -1 else -(-columns // group_size)
    high = 2 ** (bits - 1)
    low = 1 - high if symmetric and not full_range else -high
    codes = torch.randint(low, high, (rows, columns), dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = low, high - 1
    scales = (torch.rand(rows, groups) + 0.01) * 0.03
    zero_points = torch.zeros(rows, groups, dtype=torch.int8)
    if full_range:
        scales *= torch.randint(0, 2, scales.shape) * 2 - 1
    if not symmetric:
        zero_points = torch.randint(low + (not lowest_zero), high, (rows, groups), dtype=torch.int8)
        zero_points[0, 0], zero_points[-1, -1] = low + (not lowest_zero), high - 1
    return miniquant.QuantizedWeight(codes, scales.to(dtype), zero_points, bits, group_size, symmetric, full_range)


def as_read(quantized: miniquant.QuantizedWeight) -> miniquant.QuantizedWeight:
    """What a format gives back that does not store ``full_range``."""
    return replace(quantized, full_range=quantized.symmetric)


def same(actual: miniquant.QuantizedWeight, expected: miniquant.QuantizedWeight) -> bool:
    """Whether two quantized weights are equal in grid, shape, dtype and every bit."""
    pairs = list(zip(actual.tensors, expected.tensors, strict=True))
    grids = [(q.bits, q.group_size, q.symmetric, q.full_range) for q in (actual, expected)]
    return grids[0] == grids[1] and all(
        a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit()) for a, b in pairs
    )


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Every Linear of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def quantize_linears(
    model: torch.nn.Module, options: Callable[[str], Mapping[str, Any] | None], scale_dtype: torch.dtype
) -> dict[str, miniquant.QuantizedWeight]:
    """Rounds Linears to nearest, in place; ``options`` says how, and None leaves one alone."""
    out = {}
    for name, module in linears(model).items():
        chosen = options(name)
        if chosen is not None:
            out[name] = miniquant.rtn(module.weight.detach(), scale_dtype=scale_dtype, **chosen)
            module.weight.data = miniquant.dequantize(out[name], dtype=module.weight.dtype)
    return out


def checkpoint(
    model: torch.nn.Module, form: Any, quantized: Mapping[str, miniquant.QuantizedWeight]
) -> dict[str, Tensor]:
    """The state of a model with the tensors of a format in place of quantized weights."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, weight in quantized.items():
        del state[f"{name}.weight"]
        state |= form.tensors(name, weight)
    return state
