"""Every bad input and its whole error message.

A message reads ``<op>: expected <argument> <requirement>, but got <value>``. A wrong dtype is a TypeError, any other
bad argument a ValueError, and a mathematical failure a LinAlgError. Errors that do not depend on data are the same for
real tensors, meta tensors and fake tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import miniquant  # noqa: F401  (registers the operators)
import oracle

OPS = torch.ops.miniquant
LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not list it


@dataclass(frozen=True)
class Bad:
    """A call that differs from a good one (see `good_call`) in `changes`, and its error."""

    op: str
    changes: dict[str, Any]
    message: str  # after "<op>: expected "
    error: type[Exception] = ValueError
    reads_values: bool = False  # whether the data has to be read to see it
    name: str = field(default="", compare=False)


def full(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A constant matrix."""
    return torch.full(shape, value, dtype=dtype)


def one_bad(tensor: Tensor, value: float, *index: int) -> Tensor:
    """A copy of `tensor` with one element changed."""
    out = tensor.clone()
    out[index] = value
    return out


def zeros8(*shape: int) -> Tensor:
    """int8 zeros."""
    return torch.zeros(shape, dtype=torch.int8)


NAN, INF = float("nan"), float("inf")
SCALES = {"scales": full(0.5, 3, 2)}  # for the weight [3, 6] and groups of 4
ASYMMETRIC = {"symmetric": False, **SCALES, "zero_points": zeros8(3, 2)}

GRID = [  # rtn, gptq and gptq_reference
    Bad("", {"weight": full(0, 6)}, "weight to be a matrix [N, K], but got shape [6]"),
    Bad("", {"weight": full(0, 1, 3, 6)}, "weight to be a matrix [N, K], but got shape [1, 3, 6]"),
    Bad("", {"weight": torch.tensor(1.0)}, "weight to be a matrix [N, K], but got shape []"),
    Bad(
        "",
        {"weight": torch.zeros(3, 6, dtype=torch.int32)},
        "weight to be float32, float64, bfloat16 or float16, but got int32",
        TypeError,
    ),
    Bad(
        "",
        {"weight": torch.zeros(3, 6, dtype=torch.complex64)},
        "weight to be float32, float64, bfloat16 or float16, but got complex64",
        TypeError,
    ),
    Bad(
        "",
        {"weight": torch.zeros(3, 6, dtype=torch.float8_e4m3fn)},
        "weight to be float32, float64, bfloat16 or float16, but got float8_e4m3fn",
        TypeError,
    ),
    Bad(
        "",
        {"weight": one_bad(full(1, 3, 6), NAN, 1, 4)},
        "weight to be finite, but got nan at [1, 4]",
        reads_values=True,
    ),
    Bad(
        "",
        {"weight": one_bad(full(1, 3, 6), INF, 0, 0)},
        "weight to be finite, but got inf at [0, 0]",
        reads_values=True,
    ),
    Bad(
        "",
        {"weight": one_bad(full(1, 3, 6), -INF, 2, 5)},
        "weight to be finite, but got -inf at [2, 5]",
        reads_values=True,
    ),
    Bad("", {"bits": 1}, "bits to be 2 to 8, but got 1"),
    Bad("", {"bits": 9}, "bits to be 2 to 8, but got 9"),
    Bad("", {"bits": -4}, "bits to be 2 to 8, but got -4"),
    Bad("", {"group_size": 0}, "group_size to be positive, or -1 for one group per row, but got 0"),
    Bad("", {"group_size": -2}, "group_size to be positive, or -1 for one group per row, but got -2"),
    Bad("", {"scales": full(1, 3, 1)}, "scales to have shape [N, groups] = [3, 2], but got shape [3, 1]"),
    Bad("", {"scales": full(1, 2, 2)}, "scales to have shape [N, groups] = [3, 2], but got shape [2, 2]"),
    Bad("", {"scales": full(1, 6)}, "scales to have shape [N, groups] = [3, 2], but got shape [6]"),
    Bad(
        "",
        {"scales": full(1, 3, 2), "group_size": -1},
        "scales to have shape [N, groups] = [3, 1], but got shape [3, 2]",
    ),
    Bad(
        "",
        {"scales": full(1, 3, 2, dtype=torch.float64)},
        "scales to have the dtype of weight (float32), but got float64",
        TypeError,
    ),
    Bad(
        "",
        {"scales": one_bad(full(1, 3, 2), 0, 1, 1)},
        "scales to be positive and finite, but got 0 at [1, 1]",
        reads_values=True,
    ),
    Bad(
        "",
        {"scales": one_bad(full(1, 3, 2), -0.5, 2, 0)},
        "scales to be positive and finite, but got -0.5 at [2, 0]",
        reads_values=True,
    ),
    Bad(
        "",
        {"scales": one_bad(full(1, 3, 2), NAN, 0, 1)},
        "scales to be positive and finite, but got nan at [0, 1]",
        reads_values=True,
    ),
    Bad(
        "",
        {"scales": one_bad(full(1, 3, 2), INF, 0, 1)},
        "scales to be positive and finite, but got inf at [0, 1]",
        reads_values=True,
    ),
    Bad("", {"zero_points": zeros8(3, 2)}, "zero_points to come with scales, but got no scales"),
    Bad(
        "",
        {"full_range": True, "scales": one_bad(full(1, 3, 2), 0, 0, 1)},
        "scales to be finite and not 0, but got 0 at [0, 1]",
        reads_values=True,
    ),
    Bad(
        "",
        {"symmetric": False, "full_range": True},
        "full_range to be False where symmetric=False (an asymmetric grid uses every code; "
        'preset("best", symmetric=False) leaves it out), but got True',
    ),
    Bad("", {"scale_method": "max"}, "scale_method to be 'absmax', 'mse', 'hessian' or 'loss', but got 'max'"),
    Bad(
        "",
        {"scale_method": "mse", **SCALES},
        "no scales with scale_method='mse', which computes them, but got scales of shape [3, 2]",
    ),
    Bad(
        "",
        {"symmetric": False, **SCALES},
        "scales to come with zero_points where symmetric=False, but got no zero_points",
    ),
    Bad(
        "",
        {**ASYMMETRIC, "zero_points": zeros8(3, 3)},
        "zero_points to have shape [N, groups] = [3, 2], but got shape [3, 3]",
    ),
    Bad(
        "",
        {**ASYMMETRIC, "zero_points": torch.zeros(3, 2, dtype=torch.int32)},
        "zero_points to be int8, but got int32",
        TypeError,
    ),
    Bad(
        "",
        {**SCALES, "zero_points": one_bad(zeros8(3, 2), 1, 1, 0)},
        "zero_points to be 0 where symmetric=True, but got 1 at [1, 0]",
        reads_values=True,
    ),
    Bad(
        "",
        {**ASYMMETRIC, "zero_points": one_bad(zeros8(3, 2), 8, 1, 0)},
        "zero_points to be in [-8, 7] for 4 bits, but got 8 at [1, 0]",
        reads_values=True,
    ),
    Bad(
        "",
        {**ASYMMETRIC, "bits": 2, "zero_points": one_bad(zeros8(3, 2), -3, 2, 1)},
        "zero_points to be in [-2, 1] for 2 bits, but got -3 at [2, 1]",
        reads_values=True,
    ),
]

GPTQ = [  # gptq and gptq_reference
    Bad("", {"hessian": full(1, 6)}, "hessian to be a matrix [K, K], but got shape [6]"),
    Bad("", {"hessian": full(1, 6, 5)}, "hessian to be square, but got shape [6, 5]"),
    Bad(
        "",
        {"hessian": torch.eye(5)},
        "hessian to have shape [K, K] = [6, 6] for a weight of shape [3, 6], but got shape [5, 5]",
    ),
    Bad("", {"hessian": torch.eye(6).half()}, "hessian to be float32 or float64, but got float16", TypeError),
    Bad("", {"hessian": torch.eye(6).bfloat16()}, "hessian to be float32 or float64, but got bfloat16", TypeError),
    Bad("", {"hessian": torch.eye(6).long()}, "hessian to be float32 or float64, but got int64", TypeError),
    Bad(
        "",
        {"hessian": one_bad(torch.eye(6), NAN, 2, 3)},
        "hessian to be finite, but got nan at [2, 3]",
        reads_values=True,
    ),
    Bad(
        "",
        {"hessian": one_bad(torch.eye(6), INF, 5, 5)},
        "hessian to be finite, but got inf at [5, 5]",
        reads_values=True,
    ),
    Bad(
        "",
        {"hessian": one_bad(torch.eye(6), 0.5, 1, 3)},
        "hessian to be symmetric to within 0.000345267, but got 0.5 at [1, 3] and 0 at [1, 3] of its transpose",
        reads_values=True,
    ),
    Bad("", {"ridge": -0.01}, "ridge to be finite and not negative, but got -0.01"),
    Bad("", {"ridge": NAN}, "ridge to be finite and not negative, but got nan"),
    Bad("", {"ridge": INF}, "ridge to be finite and not negative, but got inf"),
    Bad("", {"block_size": 0}, "block_size to be positive, but got 0"),
    Bad("", {"block_size": -1}, "block_size to be positive, but got -1"),
    Bad("", {"group_scales": "Static"}, "group_scales to be 'static' or 'dynamic', but got 'Static'"),
    Bad("", {"group_scales": ""}, "group_scales to be 'static' or 'dynamic', but got ''"),
    Bad("", {"column_order": "act"}, "column_order to be 'natural', 'activation' or 'group', but got 'act'"),
    Bad("", {"refine": -1}, "refine to be a number of rounds, 0 or more, but got -1"),
    Bad(
        "",
        {"group_scales": "dynamic", "scale_method": "mse"},
        "scale_method to be 'absmax' or 'loss' with group_scales='dynamic' (the others use the original weights), "
        "but got 'mse'",
    ),
    Bad(
        "",
        {"group_scales": "dynamic", "column_order": "activation"},
        "column_order to be 'natural' or 'group' with group_scales='dynamic' (in activation order the columns of a "
        "stored group are not reached together), but got 'activation'",
    ),
    Bad(
        "",
        {"group_scales": "dynamic", **SCALES},
        "no scales with group_scales='dynamic', which computes them, but got scales of shape [3, 2]",
    ),
]

OTHERS = [
    Bad("gptq", {"beam_scales": -1}, "beam_scales to be from 0 to 25, but got -1"),
    Bad("gptq", {"beam_scales": 26}, "beam_scales to be from 0 to 25, but got 26"),
    Bad(
        "gptq",
        {"beam_scales": 2, "group_scales": "dynamic"},
        "scale_method to be 'loss' with beam_scales (a beam search uses the best scales of that method), but got "
        "'absmax' and beam_scales 2",
    ),
    Bad(
        "gptq",
        {"scale_method": "loss"},
        "group_scales to be 'dynamic' with scale_method='loss' (scales are chosen during the sweep), but got 'static'",
    ),
    Bad(
        "gptq_reference",
        {"scale_method": "loss", "group_scales": "dynamic"},
        "scale_method to be 'absmax', 'mse' or 'hessian', but got 'loss', which only gptq has",
    ),
    Bad("gptq_reference", {"beam_scales": 2}, "beam_scales to be 0, as only gptq searches, but got 2"),
    Bad("gptq_reference", {"refine": 1}, "refine to be 0, as only gptq refines, but got 1"),
    Bad("choose_ridge", {"tokens": 1}, "tokens to be at least 2, one for each half, but got 1"),
    Bad("choose_ridge", {"bits": 9}, "bits to be 2 to 8, but got 9"),
    Bad("choose_ridge", {"first": full(0, 6)}, "first to be a matrix [K, K], but got shape [6]"),
    Bad(
        "choose_ridge",
        {"second": torch.eye(5)},
        "second to have shape [K, K] = [6, 6] for a weight of shape [3, 6], but got shape [5, 5]",
    ),
    Bad(
        "choose_ridge",
        {"second": torch.eye(6, dtype=torch.float64)},
        "second to have the dtype of first (float32), but got float64",
        error=TypeError,
    ),
    Bad(
        "choose_ridge",
        {"second": one_bad(torch.eye(6), NAN, 1, 2)},
        "second to be finite, but got nan at [1, 2]",
        reads_values=True,
    ),
    Bad("hessian_update_", {"hessian": full(0, 4, 5)}, "hessian to be square, but got shape [4, 5]"),
    Bad("hessian_update_", {"hessian": full(0, 4)}, "hessian to be a matrix [K, K], but got shape [4]"),
    Bad(
        "hessian_update_",
        {"hessian": torch.eye(4).half()},
        "hessian to be float32 or float64, but got float16",
        TypeError,
    ),
    Bad("hessian_update_", {"inputs": full(1, 2, 5)}, "inputs to have shape [..., K] = [..., 4], but got shape [2, 5]"),
    Bad("hessian_update_", {"inputs": torch.tensor(1.0)}, "inputs to have shape [..., K] = [..., 4], but got shape []"),
    Bad(
        "hessian_update_",
        {"inputs": torch.ones(2, 4), "token_weights": torch.ones(3)},
        "token_weights to have the shape of the tokens, [2] for inputs of shape [2, 4], but got shape [3]",
    ),
    Bad(
        "hessian_update_",
        {"inputs": torch.ones(2, 4), "token_weights": torch.ones(2, dtype=torch.int64)},
        "token_weights to be floating point, but got int64",
        TypeError,
    ),
    Bad(
        "hessian_update_",
        {"inputs": torch.ones(2, 4), "token_weights": torch.tensor([1.0, -1.0])},
        "token_weights to be finite and not negative, but got -1 at [1]",
        reads_values=True,
    ),
    Bad(
        "hessian_update_",
        {"inputs": torch.ones(2, 4, dtype=torch.int64)},
        "inputs to be float32, float64, bfloat16 or float16, but got int64",
        TypeError,
    ),
    Bad(
        "hessian_update_",
        {"inputs": one_bad(full(1, 2, 3, 4), NAN, 1, 0, 2)},
        "inputs to be finite, but got nan at [1, 0, 2]",
        reads_values=True,
    ),
    Bad("product_update_", {"sum": full(0, 4)}, "sum to be a matrix [M, K], but got shape [4]"),
    Bad("product_update_", {"sum": torch.eye(4).half()}, "sum to be float32 or float64, but got float16", TypeError),
    Bad("product_update_", {"left": full(1, 2, 4)}, "left to have shape [..., M] = [..., 3], but got shape [2, 4]"),
    Bad("product_update_", {"right": full(1, 2, 3)}, "right to have shape [..., K] = [..., 4], but got shape [2, 3]"),
    Bad("product_update_", {"left": torch.tensor(1.0)}, "left to have shape [..., M] = [..., 3], but got shape []"),
    Bad(
        "product_update_",
        {"right": full(1, 3, 4)},
        "left and right to have the same tokens, but got shapes [2, 3] and [3, 4]",
    ),
    Bad(
        "product_update_",
        {"left": torch.ones(2, 3, dtype=torch.int64)},
        "left to be float32, float64, bfloat16 or float16, but got int64",
        TypeError,
    ),
    Bad(
        "product_update_",
        {"left": one_bad(full(1, 2, 3), NAN, 1, 2)},
        "left to be finite, but got nan at [1, 2]",
        reads_values=True,
    ),
    Bad(
        "product_update_",
        {"right": one_bad(full(1, 2, 4), INF, 0, 3)},
        "right to be finite, but got inf at [0, 3]",
        reads_values=True,
    ),
    Bad(
        "product_update_",
        {"sum": one_bad(full(0, 3, 4), INF, 2, 1)},
        "sum to be finite, but got inf at [2, 1]",
        reads_values=True,
    ),
    Bad(
        "product_update_",
        {"left": one_bad(full(1, 2, 3), 1e20, 1, 2), "right": one_bad(full(1, 2, 4), 1e20, 1, 3)},
        "left and right whose products keep sum finite, but got inf at [2, 3]",
        reads_values=True,
    ),
    Bad("quantization_loss", {"weight": full(0, 6)}, "weight to be a matrix [N, K], but got shape [6]"),
    Bad(
        "quantization_loss",
        {"weight": torch.zeros(3, 6, dtype=torch.int8)},
        "weight to be float32, float64, bfloat16 or float16, but got int8",
        TypeError,
    ),
    Bad(
        "quantization_loss",
        {"dequantized": full(0, 3, 5)},
        "dequantized to have the shape of weight [3, 6], but got shape [3, 5]",
    ),
    Bad(
        "quantization_loss",
        {"dequantized": torch.zeros(3, 6, dtype=torch.int32)},
        "dequantized to be float32, float64, bfloat16 or float16, but got int32",
        TypeError,
    ),
    Bad("quantization_loss", {"hessian": full(0, 6, 7)}, "hessian to be square, but got shape [6, 7]"),
    Bad(
        "quantization_loss",
        {"hessian": torch.eye(7)},
        "hessian to have shape [K, K] = [6, 6] for a weight of shape [3, 6], but got shape [7, 7]",
    ),
    Bad(
        "quantization_loss",
        {"hessian": torch.eye(6).bfloat16()},
        "hessian to be float32 or float64, but got bfloat16",
        TypeError,
    ),
    Bad("dequantize", {"codes": zeros8(6)}, "codes to be a matrix [N, K], but got shape [6]"),
    Bad("dequantize", {"codes": torch.zeros(3, 6, dtype=torch.uint8)}, "codes to be int8, but got uint8", TypeError),
    Bad("dequantize", {"group_size": 0}, "group_size to be positive, or -1 for one group per row, but got 0"),
    Bad("dequantize", {"group_size": -2}, "group_size to be positive, or -1 for one group per row, but got -2"),
    Bad("dequantize", {"scales": full(1, 3, 3)}, "scales to have shape [N, groups] = [3, 2], but got shape [3, 3]"),
    Bad("dequantize", {"group_size": -1}, "scales to have shape [N, groups] = [3, 1], but got shape [3, 2]"),
    Bad(
        "dequantize",
        {"scales": torch.ones(3, 2, dtype=torch.int8)},
        "scales to be float32, float64, bfloat16 or float16, but got int8",
        TypeError,
    ),
    Bad(
        "dequantize",
        {"zero_points": zeros8(2, 3)},
        "zero_points to have shape [N, groups] = [3, 2], but got shape [2, 3]",
    ),
    Bad("dequantize", {"zero_points": full(0, 3, 2)}, "zero_points to be int8, but got float32", TypeError),
    Bad(
        "dequantize",
        {"dtype": torch.int8},
        "dtype to be float32, float64, bfloat16 or float16, but got int8",
        TypeError,
    ),
    Bad("pack_int4", {"codes": zeros8(6)}, "codes to be a matrix [N, K], but got shape [6]"),
    Bad("pack_int4", {"codes": torch.zeros(3, 6, dtype=torch.int16)}, "codes to be int8, but got int16", TypeError),
    Bad(
        "pack_int4",
        {"codes": one_bad(zeros8(3, 6), 8, 2, 5)},
        "codes to be in [-8, 7] for 4 bits, but got 8 at [2, 5]",
        reads_values=True,
    ),
    Bad(
        "pack_int4",
        {"codes": one_bad(zeros8(3, 6), -9, 0, 1)},
        "codes to be in [-8, 7] for 4 bits, but got -9 at [0, 1]",
        reads_values=True,
    ),
    Bad(
        "unpack_int4",
        {"packed": torch.zeros(3, dtype=torch.uint8)},
        "packed to be a matrix [N, ceil(K * bits / 8)], but got shape [3]",
    ),
    Bad("unpack_int4", {"packed": zeros8(3, 3)}, "packed to be uint8, but got int8", TypeError),
    Bad(
        "unpack_int4",
        {"columns": 7},
        "packed to have shape [N, ceil(K * bits / 8)] = [3, 4] for 7 columns of 4 bits, but got shape [3, 3]",
    ),
    Bad(
        "unpack_int4",
        {"columns": 4},
        "packed to have shape [N, ceil(K * bits / 8)] = [3, 2] for 4 columns of 4 bits, but got shape [3, 3]",
    ),
    Bad("unpack_int4", {"columns": -1}, "columns to be 0 to 576460752303423487, but got -1"),
    Bad("pack", {"bits": 9}, "bits to be 2 to 8, but got 9"),
    Bad(
        "pack",
        {"codes": one_bad(zeros8(3, 6), 4, 2, 5)},
        "codes to be in [-4, 3] for 3 bits, but got 4 at [2, 5]",
        reads_values=True,
    ),
    Bad("unpack", {"bits": 1}, "bits to be 2 to 8, but got 1"),
    Bad(
        "unpack",
        {"columns": 9},
        "packed to have shape [N, ceil(K * bits / 8)] = [3, 4] for 9 columns of 3 bits, but got shape [3, 3]",
    ),
]


def named(op: str, bad: Bad) -> Bad:
    """A test parameter: `bad` for one operator, with a name."""
    return Bad(op, bad.changes, bad.message, bad.error, bad.reads_values, f"{op}: {bad.message}")


CASES = [
    *(named(op, bad) for op in ("rtn", "gptq", "gptq_reference") for bad in GRID),
    *(named(op, bad) for op in ("gptq", "gptq_reference") for bad in GPTQ),
    *(named(bad.op, bad) for bad in OTHERS),
]


def good_call(op: str) -> dict[str, Any]:
    """Valid arguments, which every case changes in one respect."""
    weight = {"weight": torch.arange(18.0).view(3, 6) / 18}
    calls: dict[str, dict[str, Any]] = {
        "rtn": {**weight, "group_size": 4},
        "gptq": {**weight, "hessian": torch.eye(6), "group_size": 4},
        "gptq_reference": {**weight, "hessian": torch.eye(6), "group_size": 4},
        "choose_ridge": {**weight, "first": torch.eye(6), "second": torch.eye(6), "tokens": 8, "group_size": 4},
        "hessian_update_": {"hessian": torch.zeros(4, 4), "inputs": torch.ones(2, 4)},
        "product_update_": {"sum": torch.zeros(3, 4), "left": torch.ones(2, 3), "right": torch.ones(2, 4)},
        "quantization_loss": {**weight, "dequantized": torch.zeros(3, 6), "hessian": torch.eye(6)},
        "dequantize": {"codes": zeros8(3, 6), "scales": full(1, 3, 2), "zero_points": zeros8(3, 2), "group_size": 4},
        "pack": {"codes": zeros8(3, 6), "bits": 3},
        "unpack": {"packed": torch.zeros(3, 3, dtype=torch.uint8), "bits": 3, "columns": 6},
        "pack_int4": {"codes": zeros8(3, 6)},
        "unpack_int4": {"packed": torch.zeros(3, 3, dtype=torch.uint8), "columns": 6},
    }
    return calls[op]


def call(op: str, arguments: dict[str, Any], convert: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Any:
    """The operator on `arguments`, each tensor converted."""
    converted = {key: convert(value) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    return getattr(OPS, op)(**converted)


def said(error: BaseException) -> str:
    """An error's own message, without the C++ stack that debug environments append."""
    return str(error).split("\nException raised from", maxsplit=1)[0].strip()


@pytest.mark.parametrize("op", sorted({bad.op for bad in CASES}))
def test_the_call_that_they_differ_from_is_good(op: str) -> None:
    call(op, good_call(op))
    call(op, good_call(op), lambda tensor: tensor.to("meta"))


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_the_message(bad: Bad) -> None:
    arguments = {**good_call(bad.op), **copy.deepcopy(bad.changes)}
    before = copy.deepcopy(arguments)
    with pytest.raises(bad.error) as caught:
        call(bad.op, arguments)
    assert type(caught.value) is bad.error
    assert said(caught.value) == f"{bad.op}: expected {bad.message}"
    # A rejected call has changed nothing, not even the Hessian that a good call updates.
    for key, value in before.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(arguments[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [bad for bad in CASES if not bad.reads_values], ids=lambda bad: bad.name)
def test_meta_and_fake_tensors_get_the_same_message(bad: Bad) -> None:
    arguments = {**good_call(bad.op), **bad.changes}
    with pytest.raises(bad.error) as caught:
        call(bad.op, arguments, lambda tensor: tensor.to("meta"))
    assert said(caught.value) == f"{bad.op}: expected {bad.message}"
    with FakeTensorMode() as mode, pytest.raises(bad.error) as caught:
        call(bad.op, arguments, mode.from_tensor)
    assert said(caught.value) == f"{bad.op}: expected {bad.message}"


@pytest.mark.parametrize(
    ("op", "argument", "other"),
    [
        *((op, argument, "weight") for op in ("gptq", "gptq_reference") for argument in ("hessian", "scales")),
        ("gptq", "zero_points", "weight"),
        ("rtn", "scales", "weight"),
        ("rtn", "zero_points", "weight"),
        ("choose_ridge", "first", "weight"),
        ("choose_ridge", "second", "weight"),
        ("hessian_update_", "inputs", "hessian"),
        ("product_update_", "left", "sum"),
        ("product_update_", "right", "sum"),
        ("quantization_loss", "dequantized", "weight"),
        ("quantization_loss", "hessian", "weight"),
        ("dequantize", "scales", "codes"),
        ("dequantize", "zero_points", "codes"),
    ],
)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_all_on_one_device(op: str, argument: str, other: str, device: str) -> None:
    """With a real and a meta tensor, the error names the second one."""
    good = good_call(op)
    if argument in {"scales", "zero_points"} and op != "dequantize":
        good |= {"scales": full(0.5, 3, 2), "zero_points": zeros8(3, 2)}
    rest = "cpu" if device == "meta" else "meta"
    arguments = {key: value.to(rest) if isinstance(value, Tensor) else value for key, value in good.items()}
    arguments[argument] = good[argument].to(device)
    with pytest.raises(ValueError, match="device") as caught:
        call(op, arguments)
    expected = f"{op}: expected {argument} to be on the device of {other} ({rest}), but got {device}"
    assert said(caught.value) == expected


ZERO_DIAGONAL = "it has 0 at [0, 0] and 0.5 at [0, 1], but the row of an input that is always 0 must be all 0"


@pytest.mark.parametrize("op", ["gptq", "gptq_reference"])
@pytest.mark.parametrize(
    ("hessian", "ridge", "message"),
    [
        # The leading minor of order 3 is the first that is not positive: x2 = x0 + x1 in every token.
        (
            torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.9, 0.0], [0.0, 0.0, 0.0, 1.0]]),
            0.0,
            "ridge=0 (0 added to its diagonal), but the leading minor of order 3 is not; try ridge=0.01",
        ),
        (
            torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
            0.01,
            "ridge=0.01 (0.01 added to its diagonal), but the leading minor of order 2 is not; try ridge=0.1",
        ),
        (
            torch.tensor([[2.0, 4.0], [4.0, 2.0]]),
            0.5,
            "ridge=0.5 (1 added to its diagonal), but the leading minor of order 2 is not; try ridge=5",
        ),
        (
            torch.tensor([[0.0, 0.5], [0.5, 1.0]]),
            0.0,
            f"ridge=0 (0 added to its diagonal), but {ZERO_DIAGONAL}; try ridge=0.01",
        ),
        (
            torch.tensor([[0.0, 0.5], [0.5, 1.0]]),
            0.1,
            f"ridge=0.1 (0.05 added to its diagonal), but {ZERO_DIAGONAL}; try ridge=1",
        ),
    ],
    ids=["ridge 0", "ridge 0.01", "ridge 0.5", "zero diagonal", "zero diagonal, ridge 0.1"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_hessian_that_is_not_positive_definite(
    hessian: Tensor, ridge: float, message: str, op: str, dtype: torch.dtype
) -> None:
    columns = hessian.shape[0]
    for column_order in ("natural", "activation"):
        with pytest.raises(LinAlgError) as caught:
            getattr(OPS, op)(
                torch.ones(2, columns, dtype=dtype), hessian.to(dtype), ridge=ridge, column_order=column_order
            )
        assert said(caught.value) == f"{op}: expected hessian to be positive definite with {message}"


@pytest.mark.parametrize("op", ["gptq", "gptq_reference"])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 10.0])
def test_no_ridge_helps_a_negative_diagonal(op: str, ridge: float) -> None:
    with pytest.raises(LinAlgError) as caught:
        getattr(OPS, op)(torch.ones(2, 2), torch.tensor([[3.0, 0.0], [0.0, -2.0]]), ridge=ridge)
    assert said(caught.value) == (
        f"{op}: expected hessian to have a nonnegative diagonal, like every X X^T, but got -2 at [1, 1]"
    )


def test_the_hint_leads_to_a_ridge_that_serves() -> None:
    weight, hessian, ridge = torch.ones(1, 2), torch.tensor([[0.0, 0.5], [0.5, 1.0]]), 0.0
    tried = [ridge]
    for _ in range(3):
        with pytest.raises(LinAlgError) as caught:
            OPS.gptq(weight, hessian, ridge=ridge)
        ridge = float(said(caught.value).rpartition("try ridge=")[2])
        tried.append(ridge)
    OPS.gptq(weight, hessian, ridge=ridge)
    assert tried == [0.0, 0.01, 0.1, 1.0]


@pytest.mark.parametrize("op", ["gptq", "gptq_reference"])
def test_fewer_tokens_than_columns_and_no_ridge(op: str) -> None:
    """A Hessian without a ridge and with fewer tokens than inputs. Rounding decides which minor fails, but one does."""
    weight, hessian = oracle.layer(4, 64, 8)
    with pytest.raises(LinAlgError, match=r"with ridge=0 \(0 added to its diagonal\).*try ridge=0\.01$"):
        getattr(OPS, op)(weight, hessian, ridge=0.0)
    getattr(OPS, op)(weight, hessian, ridge=0.01)


@pytest.mark.parametrize("op", ["gptq", "gptq_reference"])
def test_results_that_are_not_finite_are_an_error(op: str) -> None:
    weight = torch.tensor([[3e38, 1.2e38, -0.7e38, 0.9e38]])
    with pytest.raises(ValueError, match=f"^{op}: expected weight and hessian whose products are finite"):
        getattr(OPS, op)(weight, torch.eye(4) * 1e30 + 1e29, group_size=-1)


def test_a_nan_in_a_hessian_that_is_not_read_is_no_excuse() -> None:
    """A bad Hessian is rejected even if there are no rows to quantize."""
    with pytest.raises(ValueError, match="hessian to be finite, but got nan"):
        OPS.gptq(torch.empty(0, 2), torch.full((2, 2), NAN))
