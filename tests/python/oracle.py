"""The oracle for the operators: an independent GPTQ in float64, and the rule that excuses rounding ties.

Written from Frantar et al. 2022 (arXiv:2210.17323), Algorithm 1, on numpy: one column at a time, with the upper
Cholesky factor U of H^-1 (U^T U = H^-1),

    q_j        = quantize(w_j)
    err        = (w_j - dequantize(q_j)) / U_jj
    W[:, j:]  -= outer(err, U[j, j:])

It shares only the definition of the grid with the library.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]

Mutation = Literal["none", "wrong triangle", "wrong sign", "update after quantizing"]
"""The lab's pitfalls. `assert_same_codes` has to detect every one of them."""


@dataclass(frozen=True)
class Quantized:
    """The oracle's result for a weight [N, K] with G groups per row."""

    codes: Tensor  # int8 [N, K]
    scales: Tensor  # [N, G], the weight's dtype where it is computed from the weight alone, else float64
    zero_points: Tensor  # int8 [N, G]
    row_loss: Matrix  # [N]: e H e^T with the damped H
    order: list[int]  # the columns as they were quantized
    tie_distance: Matrix  # [N, K]: from the nearest rounding tie, in levels (units of the scale)
    zero_tie_distance: Matrix  # [N, G]: the same of the zero point
    tie_tolerance: float  # levels; see `tie_tolerance`
    loss_rounding: float  # what is left of a loss that is 0 but for rounding: (8 K eps)^2 of the largest w H w^T


SMALLEST_SCALE = {
    torch.float64: 2.0**-1022,
    torch.float32: 2.0**-126,
    torch.bfloat16: 2.0**-126,
    torch.float16: 2.0**-24,
}
"""The min scale of a group that is not all 0: the smallest normal number, in float16 the smallest subnormal."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32: the half types are computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """The lowest and the highest code."""
    half = 2 ** (bits - 1)
    return (1 - half if symmetric else -half), half - 1


def group_slices(columns: int, group_size: int) -> Iterator[slice]:
    """The groups of a row; the last may be shorter, and -1 is one group per row."""
    step = columns if group_size == -1 else group_size
    for begin in range(0, columns, max(step, 1)):
        yield slice(begin, min(begin + step, columns))


def group_grid(values: Tensor, bits: int, *, symmetric: bool, stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero point and the zero point's distance from a tie, per row, of one group [N, columns].

    In the dtype of `values`, the scale rounded to `stored` before it is used for anything.
    """
    code_min, code_max = code_range(bits, symmetric=symmetric)
    if symmetric:
        scale = values.abs().amax(1) / code_max
        empty = scale == 0
        scale = _stored_scale(torch.where(empty, 1.0, scale), stored)
        return scale, torch.zeros_like(scale), torch.full_like(scale, 0.5)
    low = values.amin(1).clamp(max=0)
    high = values.amax(1).clamp(min=0)
    empty = low == high
    # Each term is halved; otherwise the range of the largest weights could overflow.
    scale = (high / 2 - low / 2) / (code_max - code_min) * 2
    scale = _stored_scale(torch.where(empty, 1.0, scale), stored)
    offset = (-low / scale).clamp(0, code_max - code_min)
    zero_point = torch.where(empty, 0.0, code_min + offset.round())
    return scale, zero_point, _distance_from_tie(offset)


def rtn(
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points by the definition of the grid, in the compute dtype: exact, no tolerance."""
    values = weight.detach().to(compute_dtype(weight.dtype))
    code_min, code_max = code_range(bits, symmetric=symmetric)
    slices = list(group_slices(weight.shape[1], group_size))
    codes = torch.empty(weight.shape, dtype=torch.int8)
    all_scales = torch.empty(weight.shape[0], len(slices), dtype=values.dtype)
    all_zeros = torch.zeros_like(all_scales)
    for g, columns in enumerate(slices):
        if scales is not None:
            all_scales[:, g] = scales[:, g].to(values.dtype)
            if zero_points is not None:
                all_zeros[:, g] = zero_points[:, g].to(values.dtype)
        else:
            all_scales[:, g], all_zeros[:, g], _ = group_grid(
                values[:, columns], bits, symmetric=symmetric, stored=weight.dtype
            )
        level = (values[:, columns] / all_scales[:, g, None]).round()
        codes[:, columns] = (level + all_zeros[:, g, None]).clamp(code_min, code_max).to(torch.int8)
    return codes, all_scales.to(weight.dtype), all_zeros.to(torch.int8)


def dequantize(codes: Tensor, scales: Tensor, zero_points: Tensor, group_size: int) -> Matrix:
    """(code - zero point) * scale in float64."""
    out = codes.to(torch.float64).clone()
    for g, columns in enumerate(group_slices(codes.shape[1], group_size)):
        out[:, columns] -= zero_points[:, g, None].to(torch.float64)
        out[:, columns] *= scales[:, g, None].to(torch.float64)
    return out.numpy()


def damp(hessian: Tensor, ridge: float) -> Tensor:
    """H + ridge * mean(diag H) * I in float64."""
    h = hessian.detach().to(torch.float64)
    mean = float(h.diagonal().mean()) if h.numel() else 0.0
    return h + ridge * mean * torch.eye(h.shape[0], dtype=torch.float64)


def quadratic_form(error: Matrix, hessian: Matrix) -> Matrix:
    """E H E^T per row."""
    form: Matrix = np.einsum("ri,ij,rj->r", error, hessian, error, optimize=True)
    return form


def tie_tolerance(hessian: Matrix, bits: int) -> float:
    """The max distance from a tie, in levels, at which float64 rounding can move a target over it.

    A backward stable factorization followed by substitution quantizes for a Hessian perturbed by a small multiple of
    K eps |H| (here 4). That moves the targets by at most the condition number times as much, relative to their size,
    and near a tie of the grid they are at most 2^(bits-1) levels large.
    """
    columns = max(hessian.shape[0], 1)
    condition = float(np.linalg.cond(hessian)) if hessian.size else 1.0
    return float(4 * columns * np.finfo(np.float64).eps * condition * 2 ** (bits - 1))


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    ridge: float = 0.01,
    group_scales: Literal["static", "dynamic"] = "static",
    column_order: Literal["natural", "activation"] = "natural",
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    mutation: Mutation = "none",
) -> Quantized:
    """Algorithm 1 in float64. Static scales are those of `rtn`, rounded as the weight's dtype asks."""
    original: Matrix = weight.detach().to(torch.float64).numpy()
    damped: Matrix = damp(hessian, ridge).numpy()
    damped = (damped + damped.T) / 2
    rows, columns = original.shape
    code_min, code_max = code_range(bits, symmetric=symmetric)

    _, static_scales, static_zeros = rtn(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, scales=scales, zero_points=zero_points
    )
    groups = list(group_slices(columns, group_size))
    group_of = [g for g, columns_ in enumerate(groups) for _ in range(columns_.start, columns_.stop)]
    scale: Matrix = static_scales.to(torch.float64).numpy().copy()
    zero: Matrix = static_zeros.to(torch.float64).numpy().copy()
    zero_tie: Matrix = np.full(scale.shape, 0.5)

    order = list(range(columns))
    if column_order == "activation":
        diagonal = hessian.diagonal().tolist()
        order.sort(key=lambda column: -diagonal[column])

    # For an input that is always 0, without a ridge, any positive pivot decouples its column.
    pivoted = damped + np.diag((np.diag(damped) == 0).astype(np.float64))
    pivoted = pivoted[np.ix_(order, order)]
    upper: Matrix = np.linalg.cholesky(np.linalg.inv(pivoted)).T if columns else pivoted
    if mutation == "wrong triangle":
        upper = upper.T
    sign = 1.0 if mutation == "wrong sign" else -1.0
    # One by one; the mutation rounds eight columns before it compensates for any of them.
    update_every = 8 if mutation == "update after quantizing" else 1

    w: Matrix = original[:, order].copy()
    codes: Matrix = np.zeros((rows, columns))
    tie: Matrix = np.full((rows, columns), 0.5)
    pending: list[tuple[int, Matrix]] = []
    for j, column in enumerate(order):
        g = group_of[column]
        if group_scales == "dynamic" and column == groups[g].start:
            updated = torch.from_numpy(w[:, groups[g]].copy())
            new_scale, new_zero, new_tie = group_grid(updated, bits, symmetric=symmetric, stored=weight.dtype)
            scale[:, g], zero[:, g], zero_tie[:, g] = new_scale.numpy(), new_zero.numpy(), new_tie.numpy()
        level = np.clip(w[:, j] / scale[:, g], code_min - zero[:, g], code_max - zero[:, g])
        rounded = np.rint(level)
        codes[:, column] = rounded + zero[:, g]
        tie[:, column] = _distance_from_tie(torch.from_numpy(level)).numpy()
        pending.append((j, (w[:, j] - rounded * scale[:, g]) / upper[j, j]))
        if len(pending) == update_every or j == columns - 1:
            for i, err in pending:
                w[:, i + 1 :] += sign * np.outer(err, upper[i, i + 1 :])
            pending.clear()

    code_tensor = torch.from_numpy(codes).to(torch.int8)
    scale_tensor = static_scales if group_scales == "static" else torch.from_numpy(scale)
    zero_tensor = torch.from_numpy(zero).to(torch.int8)
    error: Matrix = original - dequantize(code_tensor, scale_tensor, zero_tensor, group_size)
    return Quantized(
        codes=code_tensor,
        scales=scale_tensor,
        zero_points=zero_tensor,
        row_loss=quadratic_form(error, damped),
        order=order,
        tie_distance=tie,
        zero_tie_distance=zero_tie,
        tie_tolerance=tie_tolerance(pivoted, bits),
        loss_rounding=float(
            (8 * columns * np.finfo(np.float64).eps) ** 2 * np.max(quadratic_form(original, damped), initial=0.0)
        ),
    )


def assert_same_codes(codes: Tensor, expected: Quantized, *, zero_points: Tensor | None = None) -> int:
    """Code for code, ties aside; returns the number of rows that a tie excuses.

    The first code of a row, in the order of quantization, that differs must lie within `tie_tolerance` of a tie: the
    answer may then be either, and so may every later code of that row. (With dynamic scales the tie may also be that of
    the group's zero point.)
    """
    assert codes.dtype == torch.int8
    assert codes.shape == expected.codes.shape
    differs = (codes != expected.codes)[:, expected.order]
    excused = 0
    for row in differs.any(1).nonzero().flatten().tolist():
        first = expected.order[int(differs[row].to(torch.int8).argmax())]
        distance = float(expected.tie_distance[row, first])
        if zero_points is not None:
            changed = (zero_points[row] != expected.zero_points[row]).nonzero().flatten().tolist()
            distance = min([distance, *(float(expected.zero_tie_distance[row, g]) for g in changed[:1])])
        assert distance <= expected.tie_tolerance, (
            f"row {row}: {int(differs[row].sum())} codes differ; the first, in column {first}, is "
            f"{int(codes[row, first])}, expected {int(expected.codes[row, first])}, {distance:.3g} levels from a tie "
            f"where {expected.tie_tolerance:.3g} is rounding"
        )
        excused += 1
    return excused


def layer(
    rows: int,
    columns: int,
    tokens: int,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    correlated: bool = True,
) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and the Hessian X X^T / n of `tokens` inputs, float32 unless `dtype` is float64.

    Correlated inputs have channels of uneven size that share a few directions, as those of real layers do.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 0.02
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    if correlated:
        shared = torch.randn(4, columns, generator=generator, dtype=torch.float64)
        inputs += torch.randn(tokens, 4, generator=generator, dtype=torch.float64) @ shared
        inputs *= torch.rand(columns, generator=generator, dtype=torch.float64) * 2 + 0.1
    hessian = inputs.mT @ inputs / max(tokens, 1)
    return weight.to(dtype), hessian.to(compute_dtype(dtype))


@dataclass(frozen=True)
class Lab:
    """The lab's layer: W, then X, then fresh inputs from one generator seeded 42; float32."""

    weight: Tensor  # [768, 768]
    hessian: Tensor  # X X^T / 128
    fresh_hessian: Tensor  # of 8192 tokens of the same distribution


@cache
def lab(distribution: Literal["normal", "cauchy"]) -> Lab:
    """The lab's layer as the driver draws it; restores the default generator. Callers share it: do not change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42)
        weight = torch.randn(768, 768) * 0.02
        hessians = []
        for tokens in (128, 8192):
            inputs = torch.randn(768, tokens) if distribution == "normal" else torch.empty(768, tokens).cauchy_()
            hessians.append(inputs @ inputs.mT / tokens)
    return Lab(weight, *hessians)


def awkward_layouts(tensor: Tensor) -> Mapping[str, Tensor]:
    """The values of a matrix in every layout that is not plain row-major."""
    rows, columns = tensor.shape
    strided = torch.full((2 * rows, 3 * columns), float("nan"), dtype=tensor.dtype)[::2, ::3]
    strided.copy_(tensor)
    padded = torch.full((rows + 2, columns + 5), float("nan"), dtype=tensor.dtype)[1:-1, 3:-2]
    padded.copy_(tensor)
    return {
        "transposed": tensor.t().contiguous().t(),
        "strided": strided,
        "padded": padded,
        "flipped": tensor.flip(0).contiguous().flip(0),
    }


def same_bits(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """Whether two operators' outputs are equal in number, shape, dtype and every bit."""
    pairs = itertools.zip_longest(actual, expected)
    return all(
        a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in pairs
    )


def option_id(options: Mapping[str, Any]) -> str:
    """A test's name from its options."""
    return "-".join(f"{key}={value}" for key, value in options.items()) or "defaults"


def _stored_scale(scale: Tensor, stored: torch.dtype) -> Tensor:
    """In the dtype of `scale`, as rounded to `stored`."""
    return scale.to(stored).to(scale.dtype).clamp(min=SMALLEST_SCALE[stored])


def _distance_from_tie(level: Tensor) -> Tensor:
    return (level - level.floor() - 0.5).abs()
