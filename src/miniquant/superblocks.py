"""Grids with two levels of scales: the K types of GGUF, which llama.cpp reads.

A superblock is 256 columns of a row. It has a step d in float16; the scale of each of its groups is a multiple of d. In
types with minima, ``value = (code - zero_point) * scale - minimum``, where minima are multiples of a second step.

    ====  ====  =================  ============  ===============  ===============
    type  bits  columns per group  scale / d     minimum / its d  bits per weight
    ====  ====  =================  ============  ===============  ===============
    Q2_K  2     16                 1 to 15       0 to 15          2.625
    Q3_K  3     16                 -32 to 31     none             3.4375
    Q4_K  4     32                 1 to 63       0 to 63          4.5
    Q5_K  5     32                 1 to 63       0 to 63          5.5
    Q6_K  6     16                 -128 to 127   none             6.5625
    ====  ====  =================  ============  ===============  ===============

A scale may not be 0 here: a group is never lost as a whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, get_args

import torch
import torch.export
from torch import Tensor

from miniquant.gptq import ColumnOrder, GroupScales
from miniquant.grid import ScaleMethod, SuperblockKind, SuperblockWeight
from miniquant.operators import call

SUPERBLOCK = 256  # columns


class GroupGrid(NamedTuple):
    """The grid of a type's groups, as of :func:`miniquant.gptq`."""

    bits: int
    group_size: int
    symmetric: bool


# Read at import: a compiled function needs plain values.
GRIDS: Mapping[SuperblockKind, GroupGrid] = MappingProxyType(
    {kind: GroupGrid(*torch.ops.miniquant.superblock_grid(kind)) for kind in get_args(SuperblockKind)}
)


@dataclass(frozen=True, eq=False)
class SuperblockResult(SuperblockWeight):
    """A weight that was quantized with a Hessian.

    Attributes:
        row_loss: [N], as of :class:`miniquant.GptqResult`.
    """

    row_loss: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of :class:`miniquant.SuperblockWeight`, and the loss of each row."""
        return *super().tensors, self.row_loss


torch.export.register_dataclass(SuperblockResult, serialized_type_name="miniquant.SuperblockResult")


def rtn_superblocks(weight: Tensor, kind: SuperblockKind) -> SuperblockWeight:
    """:func:`miniquant.rtn` on the grid of a type, with scales for each group's range, then rounded to multiples.

    Args:
        weight: [N, K], K a multiple of 256.
        kind: the type.

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    codes, scales, zero_points, *steps = call("rtn_superblocks", weight, kind)
    return SuperblockWeight(codes, scales, zero_points, *_grid(kind), kind, *steps)


def gptq_superblocks(
    weight: Tensor,
    hessian: Tensor,
    kind: SuperblockKind,
    *,
    scale_method: ScaleMethod = "absmax",
    ridge: float = 0.01,
    block_size: int = 128,
    group_scales: GroupScales = "static",
    column_order: ColumnOrder = "natural",
    refine: int = 0,
    beam_scales: int = 0,
) -> SuperblockResult:
    """:func:`miniquant.gptq` on the grid of a type.

    A first sweep chooses scales of any size, as the options say. The step of a superblock is the one of least squared
    error of these scales. A second sweep chooses codes for scales and minima that are multiples of the steps;
    refinement moves codes, scales and minima, never the steps.

    Args:
        weight: [N, K], K a multiple of 256.
        hessian: [K, K].
        kind: the type.
        scale_method: this and all further options as of :func:`miniquant.gptq`; ``preset(name, kind=kind)`` has them.
        ridge: as there.
        block_size: as there.
        group_scales: as there.
        column_order: as there.
        refine: as there.
        beam_scales: as there.

    Raises:
        ValueError, TypeError: for a bad argument.
        torch.linalg.LinAlgError: as of :func:`miniquant.gptq`.

    Example:
        >>> quantized = gptq_superblocks(weight, hessian, "Q4_K", **preset("best", kind="Q4_K"))
    """
    codes, scales, zero_points, minima, super_scales, super_minima, row_loss = call(
        "gptq_superblocks",
        weight,
        hessian,
        kind,
        scale_method=scale_method,
        ridge=ridge,
        block_size=block_size,
        group_scales=group_scales,
        column_order=column_order,
        refine=refine,
        beam_scales=beam_scales,
    )
    parts = (codes, scales, zero_points, *_grid(kind), kind, minima, super_scales, super_minima)
    return SuperblockResult(*parts, row_loss)


def _grid(kind: SuperblockKind) -> tuple[int, int, bool, bool]:
    """Bits, group size, symmetric and full range."""
    grid = GRIDS[kind]
    return *grid, grid.symmetric
