"""The grid that a weight is quantized to: rounding to nearest, and dequantization."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast, overload

import torch
import torch.export
from torch import Tensor

from miniquant.operators import call

SuperblockKind = Literal["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
ScaleMethod = Literal["absmax", "mse", "hessian", "loss"]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized weight and its grid.

    Attributes:
        codes: int8 [N, K].
        scales: [N, G], of ``scale_dtype``.
        zero_points: int8 [N, G]; all 0 for a symmetric grid.
        bits: bits of a code, 2 to 8.
        group_size: columns per scale; -1 is one group per row.
        symmetric: True for a symmetric grid, False for an asymmetric one (see the package).
        full_range: True for the symmetric grid with one more code.

    Iterating gives the tensors: ``codes, scales, zero_points = rtn(weight)``.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    bits: int
    group_size: int
    symmetric: bool
    full_range: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the operator of ``torch.ops.miniquant`` returns: codes, scales, zero points."""
        return self.codes, self.scales, self.zero_points

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> "QuantizedWeight":
        """The same with what a function gives for each tensor, all of which have a row for each row of the weight.

        Example:
            >>> half = quantized.map(lambda tensor: tensor[: len(tensor) // 2])
        """
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        made: dict[str, Any] = {name: function(value) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **made)


torch.export.register_dataclass(QuantizedWeight, serialized_type_name="miniquant.QuantizedWeight")


@dataclass(frozen=True, eq=False)
class SuperblockWeight(QuantizedWeight):
    """A weight quantized to a type of GGUF with two levels of scales (:mod:`miniquant.superblocks`).

    ``value = (code - zero_point) * scale - minimum``. ``scales`` are float32; they and ``minima`` are whole multiples
    of the steps of their superblock of 256 columns. Where there are minima, zero points are the lowest code.

    Attributes:
        kind: the type, "Q4_K" for instance.
        minima: float32 [N, G]; 0 for a symmetric grid.
        super_scales: float16 [N, K / 256], the steps of the scales.
        super_minima: float16 [N, K / 256], the steps of the minima.
    """

    kind: SuperblockKind
    minima: Tensor
    super_scales: Tensor
    super_minima: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scales, zero points, minima, and the steps of scales and of minima."""
        return *super().tensors, self.minima, self.super_scales, self.super_minima


torch.export.register_dataclass(SuperblockWeight, serialized_type_name="miniquant.SuperblockWeight")


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
        symmetric: a symmetric or an asymmetric grid (see the package).
        scales: [N, G] to use instead of computed ones; of ``scale_dtype``, positive (nonzero with ``full_range``).
        zero_points: int8 [N, G] for the given ``scales``; required if ``symmetric`` is False.
        full_range: the symmetric grid with one more code (see the package).
        scale_method: "absmax", the smallest scale that covers the group's range; or "mse", the scale of least squared
            error among those for 0.5 to 1.1 times the group's range.
        scale_dtype: the dtype in which scales will be stored: float32, bfloat16, float16 or, for a float64 weight,
            float64; None is the weight's. Scales are rounded to it before codes are chosen, and returned in it.

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    codes, scales, zero_points = call(
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
    return QuantizedWeight(codes, scales, zero_points, bits, group_size, symmetric, full_range)


@overload
def dequantize(codes: QuantizedWeight, *, dtype: torch.dtype | None = None) -> Tensor: ...


@overload
def dequantize(
    codes: Tensor, scales: Tensor, zero_points: Tensor, group_size: int, *, dtype: torch.dtype | None = None
) -> Tensor: ...


def dequantize(
    codes: Tensor | QuantizedWeight,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    group_size: int | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``(codes - zero_points) * scales``, each group with its own; less its minimum in a :class:`SuperblockWeight`.

    The product is computed in the widest of float32, the dtype of ``scales`` and ``dtype``, then rounded to ``dtype``.
    With bfloat16 scales, ``dtype=torch.float32`` gives the exact values, for which ``row_loss`` is measured; None gives
    the values that a bfloat16 layer computes with.

    Args:
        codes: a whole :class:`QuantizedWeight`, without further arguments except ``dtype``; or int8 [N, K].
        scales: [N, G].
        zero_points: int8 [N, G].
        group_size: columns per scale; -1 is one group per row.
        dtype: dtype of the result; None is the dtype of the scales.

    Returns:
        [N, K].

    Raises:
        ValueError, TypeError: for a bad argument.

    Example:
        >>> values = dequantize(rtn(weight))
    """
    given = {"scales": scales, "zero_points": zero_points, "group_size": group_size}
    if isinstance(codes, QuantizedWeight):
        for name, value in given.items():
            if value is not None:
                raise TypeError(
                    f"dequantize: expected no {name} beside a QuantizedWeight, which has its own, but got it"
                )
        if isinstance(codes, SuperblockWeight):
            values = dequantize(codes.codes, codes.scales, codes.zero_points, codes.group_size, dtype=torch.float32)
            return (values - codes.minima.repeat_interleave(codes.group_size, 1)).to(dtype or torch.float32)
        return dequantize(codes.codes, codes.scales, codes.zero_points, codes.group_size, dtype=dtype)
    for name, value in given.items():
        if value is None:
            raise TypeError(
                f"dequantize: expected {name} beside codes (a whole QuantizedWeight has its own), but got no {name}"
            )
    return cast("Tensor", call("dequantize", codes, scales, zero_points, group_size, dtype=dtype))
