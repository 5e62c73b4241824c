"""The algorithm: GPTQ in its fast form, and in its textbook form."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.export
from torch import Tensor

from miniquant.grid import QuantizedWeight, ScaleMethod
from miniquant.operators import call

GroupScales = Literal["static", "dynamic"]
ColumnOrder = Literal["natural", "activation", "group"]


@dataclass(frozen=True, eq=False)
class GptqResult(QuantizedWeight):
    """A quantized weight and its loss.

    Attributes:
        row_loss: [N], e H e^T of each row with the ridge in H, at least 0; float64 for a float64 weight, otherwise
            float32. Here e = weight - (code - zero_point) * scale, with the product computed in that dtype. A bfloat16
            or float16 layer rounds the product once more; ``quantization_loss(weight, dequantize(result,
            dtype=weight.dtype), hessian)`` measures the loss of such a layer: 1.36 times as much for a bfloat16 weight
            at 8 bits in our test.

    Iterating gives the tensors: ``codes, scales, zero_points, row_loss = gptq(weight, hessian)``.
    """

    row_loss: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the operator returns: codes, scales, zero points, loss of each row."""
        return self.codes, self.scales, self.zero_points, self.row_loss


torch.export.register_dataclass(GptqResult, serialized_type_name="miniquant.GptqResult")


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    full_range: bool = False,
    scale_method: ScaleMethod = "absmax",
    scale_dtype: torch.dtype | None = None,
    ridge: float = 0.01,
    block_size: int = 128,
    group_scales: GroupScales = "static",
    column_order: ColumnOrder = "natural",
    refine: int = 0,
    beam_scales: int = 0,
) -> GptqResult:
    """Quantizes one column at a time and compensates for its rounding error in the columns that follow.

    With H + ridge * mean(diag H) * I = R R^T, R upper triangular, and E = W - Q:

    ``target_j = w_j + (sum_{i<j} E_i R_ij) / R_jj``,  ``q_j = quantize(target_j)``

    This is Algorithm 1 of the paper without the inverse of H; :func:`gptq_reference` is the algorithm as printed. The
    result does not depend on the number of threads; ``block_size`` changes it by rounding only. The column of an input
    that is always 0 (its row and column of H are 0) is rounded to nearest on the final scales.

    Args:
        weight: [N, K].
        hessian: [K, K], float32 or float64, symmetric: X X^T / n without a ridge (:class:`HessianAccumulator`).
        bits: 2 to 8.
        group_size: columns per scale; -1 is one group per row.
        symmetric: a symmetric or an asymmetric grid (see the package).
        scales: [N, G] to use instead of computed ones; of ``scale_dtype``, positive (nonzero with ``full_range``).
        zero_points: int8 [N, G] for the given ``scales``; required if ``symmetric`` is False.
        full_range: the symmetric grid with one more code (see the package).
        scale_method: how scales are computed: "absmax", the smallest that covers the group's range; "mse", of several
            candidates the one of least squared error; "hessian", the same with column j weighted by H_jj; "loss"
            (dynamic scales only), of several candidates the one with which the sweep adds least to the loss.
        scale_dtype: the dtype in which scales will be stored: float32, bfloat16, float16 or, for a float64 weight,
            float64; None is the weight's. Scales are rounded to it before codes are chosen, and returned in it.
        ridge: added to the Hessian's diagonal, relative to its mean.
        block_size: columns per block of the sweep; affects the time, not the result.
        group_scales: "static" computes a group's scale from the original weights; "dynamic" just before the group is
            quantized, from the weights as updated by every earlier column (not in activation order, and not with given
            scales).
        column_order: "natural"; "activation": descending diag(H); or "group": whole groups by descending mean diag(H),
            a shorter last group last. The order within a group is chosen from its last column to its first: each has
            the least variance given those after it. Groups are of stored columns in every order.
        refine: max rounds of refinement after the sweep. The first round changes single codes and keeps the scales,
            until hardly any change lowers the loss; further rounds fit the scales to their codes as well. Stops when
            nothing changes.
        beam_scales: how many of the best scales that ``scale_method="loss"`` finds for a group, 0 to 25, are tried
            again with a beam search that keeps four partial choices of codes.

    Raises:
        ValueError, TypeError: for a bad argument.
        torch.linalg.LinAlgError: H is not positive definite with its ridge, or has a negative diagonal entry; the
            message names the leading minor, the ridge used and a ridge to try.
    """
    codes, scales, zero_points, row_loss = call(
        "gptq",
        weight,
        hessian,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        scales=scales,
        zero_points=zero_points,
        full_range=full_range,
        scale_method=scale_method,
        scale_dtype=scale_dtype,
        ridge=ridge,
        block_size=block_size,
        group_scales=group_scales,
        column_order=column_order,
        refine=refine,
        beam_scales=beam_scales,
    )
    return GptqResult(codes, scales, zero_points, bits, group_size, symmetric, full_range, row_loss)


def gptq_reference(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    full_range: bool = False,
    scale_method: ScaleMethod = "absmax",
    scale_dtype: torch.dtype | None = None,
    ridge: float = 0.01,
    block_size: int = 128,
    group_scales: GroupScales = "static",
    column_order: ColumnOrder = "natural",
    refine: int = 0,
    beam_scales: int = 0,
) -> GptqResult:
    """The textbook form of :func:`gptq`: the loop over blocks, groups and columns of the paper's Algorithm 1.

    With ``Hinv`` the UPPER Cholesky factor of the inverse of H + ridge * mean(diag H) * I, for each column k:

    ``err = (w_k - q_k) / Hinv[k, k]``,  ``W[:, k:] -= outer(err, Hinv[k, k:])``

    It uses PyTorch's own operations, runs on any device, and is slow; :func:`gptq` is tested against it. The codes of
    the two are equal, except where a target lies on a rounding tie to within the precision of the arithmetic.
    Arguments, result and errors are those of :func:`gptq`, but ``scale_method="loss"``, ``beam_scales`` and ``refine``
    are rejected, and scale methods other than "absmax" need the CPU.
    """
    codes, scales, zero_points, row_loss = call(
        "gptq_reference",
        weight,
        hessian,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        scales=scales,
        zero_points=zero_points,
        full_range=full_range,
        scale_method=scale_method,
        scale_dtype=scale_dtype,
        ridge=ridge,
        block_size=block_size,
        group_scales=group_scales,
        column_order=column_order,
        refine=refine,
        beam_scales=beam_scales,
    )
    return GptqResult(codes, scales, zero_points, bits, group_size, symmetric, full_range, row_loss)
