"""Weights in the blocks of GGUF, of 32 or 256 columns each: what llama.cpp reads, with the codes that were chosen here.

Q2_K to Q6_K, of 256 columns, are in ``gguf_superblocks``; the others here.

A block has one scale d, float16. With unsigned codes u:

    Q4_0, Q5_0    value = (u - 8) * d, (u - 16) * d          4, 5 bits; d may be negative
    Q8_0          value = s * d                              s int8
    Q4_1, Q5_1    value = u * d + m                          m float16

The value of a code is ``(code - zero_point) * scale``. Where the integers ``code - zero_point`` that a grid may have
fit into Q4_0, Q5_0 or Q8_0, these hold the weight exactly: symmetric grids of every width, asymmetric ones of 2, 3, 6
and 7 bits. 4 and 5 asymmetric bits go to Q4_1 and Q5_1, whose m is ``-zero_point * scale`` (of the unsigned zero
point) rounded to float16: every weight of a group is off by the same amount, at most 15 * 2^-11 = 0.73% of a step for
4 bits and 31 * 2^-11 = 1.5% for 5. With ``exact`` they go to the wider Q5_0 and Q8_0, which hold them as they are. 8
asymmetric bits fit into no type.

A group longer than 32 columns repeats its scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from miniquant.formats import gguf_superblocks
from miniquant.formats.base import (
    LayerFormat,
    LayerGrid,
    check_finite,
    check_float16_scales,
    check_model_dtype,
    checked_grid,
)
from miniquant.grid import QuantizedWeight, SuperblockKind, SuperblockWeight
from miniquant.layer_file import check_quantized, dtype_names
from miniquant.superblocks import GRIDS, SUPERBLOCK

NAME = "gguf"
COLUMNS = 32  # of a block


@dataclass(frozen=True)
class BlockType:
    """How a type of GGUF stores a block.

    Attributes:
        name: as the package gguf has it.
        bits: of a code.
        has_minimum: whether a block has m beside d.
        columns: of a block.
    """

    name: str
    bits: int
    has_minimum: bool = False
    columns: int = COLUMNS

    @property
    def nbytes(self) -> int:
        """Of a block."""
        if self.columns == SUPERBLOCK:
            return gguf_superblocks.NBYTES[self.name]
        return 2 + 2 * self.has_minimum + COLUMNS * self.bits // 8

    @property
    def lowest(self) -> int:
        """The integer that is stored as 0, or for 8 bits as -128."""
        return 0 if self.has_minimum else -(1 << (self.bits - 1))


TYPES: Mapping[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 4),
        BlockType("Q4_1", 4, has_minimum=True),
        BlockType("Q5_0", 5),
        BlockType("Q5_1", 5, has_minimum=True),
        BlockType("Q8_0", 8),
        *(BlockType(name, grid.bits, not grid.symmetric, SUPERBLOCK) for name, grid in GRIDS.items()),
    )
}


class Gguf(LayerFormat):
    """A :class:`miniquant.formats.LayerFormat`: what a GGUF file can hold. :func:`write_gguf` writes the file.

    Args:
        exact: whether 4 and 5 asymmetric bits take half a bit, or 2.5 bits, more per weight in place of a rounded m.
    """

    name = NAME

    def __init__(self, *, exact: bool = False) -> None:
        self.exact = exact

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """float16, whatever the model has."""
        check_model_dtype(NAME, model_dtype)
        return torch.float16

    def check(self, name: str, grid: LayerGrid) -> list[str]:
        """float16 scales, columns in multiples of 32, groups that are whole blocks, and no 8 asymmetric bits."""
        where = f"of layer {name!r}"
        if grid.superblocks is not None:
            if grid.columns % SUPERBLOCK:
                raise ValueError(
                    f"{NAME}: expected columns {where} to be a multiple of {SUPERBLOCK} for {grid.superblocks}, but "
                    f"got {grid.columns} (choose bits and a group_size of {COLUMNS} for it)"
                )
            return []
        check_float16_scales(NAME, name, grid)
        if grid.columns % COLUMNS:
            raise ValueError(
                f"{NAME}: expected columns {where} to be a multiple of {COLUMNS}, but got {grid.columns} (skip the "
                "layer)"
            )
        if grid.group_size != -1 and grid.group_size % COLUMNS:
            raise ValueError(
                f"{NAME}: expected group_size {where} to be -1 or a multiple of {COLUMNS}, the columns of a block, but "
                f"got {grid.group_size}"
            )
        kind = self.type_of(name, grid)
        warnings = []
        if kind.has_minimum:
            largest = ((1 << grid.bits) - 1) / 2**11
            warnings.append(
                f"{NAME}: layer {name!r}: {kind.name} stores the minimum of a group in float16, which moves its "
                f"weights by at most {100 * largest:.2g}% of a step (exact=True takes a wider type and moves none)"
            )
        return warnings

    def nbytes(self, name: str, grid: LayerGrid) -> int:
        """Of the blocks."""
        kind = self.type_of(name, grid)
        return grid.rows * grid.columns // kind.columns * kind.nbytes

    def type_of(self, name: str, grid: LayerGrid) -> BlockType:
        """The smallest type that holds the integers of a grid.

        Raises:
            ValueError: for 8 asymmetric bits.
        """
        if grid.superblocks is not None:
            return TYPES[grid.superblocks]
        if grid.symmetric:
            return TYPES["Q4_0" if grid.bits <= 4 else "Q5_0" if grid.bits == 5 else "Q8_0"]
        if grid.bits == 8:
            raise ValueError(
                f"{NAME}: expected bits of layer {name!r} to be 2 to 7 for an asymmetric grid, but got 8 (choose a "
                "symmetric one)"
            )
        if grid.bits in (4, 5) and not self.exact:
            return TYPES["Q4_1" if grid.bits == 4 else "Q5_1"]
        return TYPES["Q4_0" if grid.bits <= 3 else "Q5_0" if grid.bits == 4 else "Q8_0"]

    def blocks(self, name: str, quantized: QuantizedWeight) -> tuple[Tensor, BlockType]:
        """A weight in blocks, row after row.

        Returns:
            uint8 [N, blocks of a row * nbytes], and the type.

        Raises:
            ValueError, TypeError: where ``check`` raises, for tensors that do not fit together, and for a group whose
                minimum float16 has not.
        """
        grid = checked_grid(NAME, name, quantized)
        self.check(name, grid)
        kind = self.type_of(name, grid)
        if isinstance(quantized, SuperblockWeight):
            try:
                return gguf_superblocks.pack(quantized), kind
            except ValueError as error:
                raise ValueError(f"{NAME}: layer {name!r}: {error}") from None
        repeats = grid.columns_per_group // COLUMNS
        blocks = grid.columns // COLUMNS

        def of_blocks(values: Tensor) -> Tensor:
            """[N, G] as [N, blocks]; the last group may be shorter."""
            return values.repeat_interleave(repeats, 1)[:, :blocks]

        scales, zero_points = of_blocks(quantized.scales.detach()), of_blocks(quantized.zero_points)
        codes = quantized.codes.unflatten(1, (blocks, COLUMNS))
        fields = [_bytes(scales)]
        if kind.has_minimum:
            zeros = zero_points.float() + (1 << (kind.bits - 1))
            minimum = (0 - zeros * scales.float()).half()
            check_finite(NAME, name, "minima in float16", minimum)
            fields.append(_bytes(minimum))
            codes = codes + (1 << (kind.bits - 1))
        else:
            codes = codes - zero_points[..., None]
        if kind.bits == 8:
            fields.append(codes.contiguous().view(torch.uint8))
        else:
            unsigned = (codes - kind.lowest).to(torch.uint8)
            if kind.bits == 5:
                high = (unsigned >> 4).unflatten(2, (4, 8)) << torch.arange(8, dtype=torch.uint8)
                fields.append(high.sum(3, dtype=torch.uint8))
            first, second = (unsigned & 15).split(COLUMNS // 2, 2)
            fields.append(first | (second << 4))
        return torch.cat(fields, 2).flatten(1), kind

    def read(self, name: str, blocks: Tensor, kind: BlockType) -> QuantizedWeight:
        """A weight from its blocks: the one whose values they have, in groups of the type's columns.

        Args:
            name: of the layer.
            blocks: uint8 [N, blocks of a row * nbytes].
            kind: the type.

        Raises:
            ValueError: for another dtype or shape, scales that are not finite, and minima that are not those of a zero
                point.
        """
        if blocks.dtype != torch.uint8 or blocks.dim() != 2 or not blocks.shape[1] or blocks.shape[1] % kind.nbytes:
            raise ValueError(
                f"{NAME}: expected blocks of layer {name!r} to be uint8 of shape [N, a multiple of {kind.nbytes}], but "
                f"got {dtype_names(blocks.dtype)} of shape {list(blocks.shape)}"
            )
        if kind.columns == SUPERBLOCK:
            superblocks = gguf_superblocks.unpack(blocks, cast("SuperblockKind", kind.name))
            for what in ("super_scales", "super_minima"):
                check_finite(NAME, name, what, getattr(superblocks, what))
            return superblocks
        sizes = [2] * (1 + kind.has_minimum) + [4] * (kind.bits == 5) + [COLUMNS if kind.bits == 8 else COLUMNS // 2]
        fields = list(blocks.unflatten(1, (-1, kind.nbytes)).split(sizes, 2))
        scales = _floats(fields[0])
        check_finite(NAME, name, "scales", scales)
        if kind.bits == 8:
            codes = fields[-1].clone(memory_format=torch.contiguous_format).view(torch.int8)
        else:
            unsigned = torch.cat([fields[-1] & 15, fields[-1] >> 4], 2)
            if kind.bits == 5:
                high = (fields[-2][..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
                unsigned = unsigned | (high.flatten(2) << 4)
            codes = unsigned.to(torch.int8) - (1 << (kind.bits - 1))
        zero_points = torch.zeros(scales.shape, dtype=torch.int8)
        if kind.has_minimum:
            zero_points = _zero_points(name, scales, _floats(fields[1]), kind)
        symmetric = not kind.has_minimum
        quantized = QuantizedWeight(codes.flatten(1), scales, zero_points, kind.bits, COLUMNS, symmetric, symmetric)
        check_quantized(NAME, f"layer {name!r}", quantized)
        return quantized


def gguf_package() -> Any:
    """The package gguf, which knows files; blocks need it not."""
    try:
        import gguf  # noqa: PLC0415  (only for this format)
    except ImportError as error:
        raise ImportError("gguf: expected the package gguf to be installed (pip install gguf), but got none") from error
    return gguf


def _bytes(values: Tensor) -> Tensor:
    """float16 [N, blocks] as uint8 [N, blocks, 2]."""
    return values.clone(memory_format=torch.contiguous_format)[..., None].view(torch.uint8)


def _floats(values: Tensor) -> Tensor:
    """uint8 [N, blocks, 2] as float16 [N, blocks]."""
    return values.clone(memory_format=torch.contiguous_format).view(torch.float16)[..., 0]


def _zero_points(name: str, scales: Tensor, minimum: Tensor, kind: BlockType) -> Tensor:
    """int8: the zero points with which a weight has these minima."""
    steps = 1 << kind.bits
    ratio = torch.where(scales == 0, 0.0, -minimum.float() / scales.float())
    zeros = torch.nan_to_num(ratio, nan=-1.0).round().clamp(0, steps - 1)
    stored = (0 - zeros * scales.float()).half()
    wrong = stored != minimum
    if bool(wrong.any()):
        d, m = scales[wrong][0].item(), minimum[wrong][0].item()
        raise ValueError(
            f"{NAME}: expected minima of layer {name!r} to be -z * d for a zero point z of 0 to {steps - 1}, but got "
            f"{m:.6g} with d = {d:.6g}, which no grid here has"
        )
    return (zeros - steps // 2).to(torch.int8)
