"""The grid a weight is rounded to: rounding to nearest, and back to values."""

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from miniquant.operators import call

ScaleMethod = Literal["absmax", "mse", "hessian", "loss"]


class QuantizedWeight(NamedTuple):
    """A weight on its grid.

    Attributes:
        codes: int8 [N, K].
        scales: [N, G], of ``scale_dtype``.
        zero_points: int8 [N, G]; all 0 for a symmetric grid.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor


def rtn(
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    full_range: bool = False,
    scale_method: Literal["absmax", "mse"] = "absmax",
    scale_dtype: torch.dtype | None = None,
) -> QuantizedWeight:
    """Rounds every weight to the nearest point of its group's grid, ties to even.

    ``code = clamp(round(w / scale) + zero_point)``

    Args:
        weight: [N, K].
        bits: 2 to 8.
        group_size: columns per scale; -1 is one group per row.
        symmetric: which of the two grids (see the package).
        scales: [N, G] to use instead of the weight's own; of ``scale_dtype``, positive (not 0 with ``full_range``).
        zero_points: int8 [N, G] that go with ``scales``; needed where ``symmetric`` is false.
        full_range: the symmetric grid with one code more (see the package).
        scale_method: "absmax", or "mse": of scales that hold from half to 1.1 times the group's range the one of least
            squared error.
        scale_dtype: the dtype in which scales will be stored: float32, bfloat16, float16 or, for a float64 weight,
            float64; None is the weight's. Scales are rounded to it before codes are chosen, and returned in it.

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    return QuantizedWeight(
        *call(
            "rtn",
            weight,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            scales=scales,
            zero_points=zero_points,
            full_range=full_range,
            scale_method=scale_method,
            scale_dtype=scale_dtype,
        )
    )


def dequantize(codes: Tensor, scales: Tensor, zero_points: Tensor, group_size: int) -> Tensor:
    """``(codes - zero_points) * scales``, each group with its own.

    Args:
        codes: int8 [N, K].
        scales: [N, G].
        zero_points: int8 [N, G].
        group_size: columns per scale; -1 is one group per row.

    Returns:
        [N, K] in the dtype of ``scales``.

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    return cast("Tensor", call("dequantize", codes, scales, zero_points, group_size))
