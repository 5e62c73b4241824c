"""Superblocks of 256 columns in the layouts of GGUF: Q2_K to Q6_K (:mod:`miniquant.superblocks` has their values).

Bytes of a superblock, in order; u is the code less the lowest one, columns count from the superblock's first:

    Q2_K  scale | minimum << 4 of 16 groups; u of columns c, c + 32, c + 64, c + 96 in the bit pairs of a byte, for c
          from 0 to 31 and again from 128; d and the d of minima, float16
    Q3_K  bit j of byte l: bit 2 of u of column 32 j + l; bits 0 and 1 as in Q2_K; 16 scales + 32 of 6 bits; d
    Q4_K  d and the d of minima; 8 scales and 8 minima of 6 bits; u of columns c and c + 32 in a byte, for c from 0 to
          31 and again from 64, 128 and 192
    Q5_K  as Q4_K, with bit j of byte l after the scales: bit 4 of u of column 32 j + l
    Q6_K  bits 0 to 3 of u of columns c and c + 64 in a byte, for c from 0 to 63 and again from 128; bits 4 and 5 as in
          Q2_K; 16 scales, int8; d
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from miniquant.grid import SuperblockKind, SuperblockWeight
from miniquant.superblocks import GRIDS, SUPERBLOCK

NBYTES: Mapping[str, int] = MappingProxyType({"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210})


def pack(quantized: SuperblockWeight) -> Tensor:
    """A weight in superblocks, row after row: uint8 [N, K / 256 * bytes].

    Raises:
        ValueError: where scales or minima are no multiples of their steps that the type has.
    """
    kind, grid = quantized.kind, GRIDS[quantized.kind]
    rows, columns = quantized.codes.shape
    blocks, groups = columns // SUPERBLOCK, SUPERBLOCK // grid.group_size
    unsigned = (quantized.codes.view(rows, blocks, SUPERBLOCK).short() + (1 << (grid.bits - 1))).to(torch.uint8)
    steps, minimum_steps = quantized.super_scales, quantized.super_minima
    lowest, highest = _range(kind)
    scales = _multiples(quantized.scales.view(rows, blocks, groups), steps, "scales", lowest, highest)
    minima = None
    if not grid.symmetric:
        minima = _multiples(quantized.minima.view(rows, blocks, groups), minimum_steps, "minima", 0, highest)
    d = _bytes(steps)
    if kind == "Q6_K":
        quarters = unsigned.view(rows, blocks, 2, 2, 64)  # columns 0 to 63 and 64 to 127 of a half
        low = (quarters[:, :, :, 0] & 15) | ((quarters[:, :, :, 1] & 15) << 4)
        fields = [low.flatten(2), _bit_pairs(unsigned >> 4), scales.to(torch.int8).view(torch.uint8), d]
    elif kind == "Q3_K":
        fields = [_bit_planes(unsigned >> 2), _bit_pairs(unsigned & 3), _packed_16(scales - lowest), d]
    elif minima is not None and kind == "Q2_K":
        fields = [(scales + 16 * minima).to(torch.uint8), _bit_pairs(unsigned), d, _bytes(minimum_steps)]
    else:
        assert minima is not None  # noqa: S101  (of Q4_K and Q5_K)
        halves = unsigned.view(rows, blocks, 4, 2, 32)
        low = (halves[:, :, :, 0] & 15) | ((halves[:, :, :, 1] & 15) << 4)
        high = [_bit_planes(unsigned >> 4)] if kind == "Q5_K" else []
        fields = [d, _bytes(minimum_steps), _packed_8(scales, minima), *high, low.flatten(2)]
    return torch.cat(fields, 2).flatten(1)


def unpack(blocks: Tensor, kind: SuperblockKind) -> SuperblockWeight:
    """A weight from its superblocks.

    Args:
        blocks: uint8 [N, K / 256 * bytes].
        kind: the type.
    """
    grid = GRIDS[kind]
    rows = len(blocks)
    data = blocks.unflatten(1, (-1, NBYTES[kind]))
    count = data.shape[1]
    halves = torch.zeros(rows, count, dtype=torch.float16)
    minima = torch.zeros(rows, count, SUPERBLOCK // grid.group_size)
    if kind == "Q6_K":
        low, high, stored, d = data.split([128, 64, 16, 2], 2)
        quarters = low.unflatten(2, (2, 1, 64))
        unsigned = torch.cat([quarters & 15, quarters >> 4], 3).flatten(2) | (_from_bit_pairs(high) << 4)
        scales = stored.contiguous().view(torch.int8).float()
        steps, minimum_steps = _halves(d), halves
    elif kind == "Q3_K":
        high, low, packed, d = data.split([32, 64, 12, 2], 2)
        unsigned = _from_bit_pairs(low) | (_from_bit_planes(high) << 2)
        scales = _from_packed_16(packed).float() + _range(kind)[0]
        steps, minimum_steps = _halves(d), halves
    elif kind == "Q2_K":
        both, low, d, m = data.split([16, 64, 2, 2], 2)
        unsigned, scales, minima = _from_bit_pairs(low), (both & 15).float(), (both >> 4).float()
        steps, minimum_steps = _halves(d), _halves(m)
    else:
        d, m, packed, *high_bits, nibbles = data.split([2, 2, 12, *([32] if kind == "Q5_K" else []), 128], 2)
        quarters = nibbles.unflatten(2, (4, 1, 32))
        unsigned = torch.cat([quarters & 15, quarters >> 4], 3).flatten(2)
        if high_bits:
            unsigned = unsigned | (_from_bit_planes(high_bits[0]) << 4)
        scales, minima = (part.float() for part in _from_packed_8(packed))
        steps, minimum_steps = _halves(d), _halves(m)
    lowest = -(1 << (grid.bits - 1))
    values = (scales * steps[..., None].float()).flatten(1)
    return SuperblockWeight(
        (unsigned.to(torch.int8) + lowest).flatten(1),
        values,
        torch.full(values.shape, 0 if grid.symmetric else lowest, dtype=torch.int8),
        *grid,
        grid.symmetric,
        kind,
        (minima * minimum_steps[..., None].float()).flatten(1),
        steps,
        minimum_steps,
    )


def _range(kind: SuperblockKind) -> tuple[int, int]:
    """The lowest and the highest multiple of a step that fits."""
    return {"Q2_K": (0, 15), "Q3_K": (-32, 31), "Q6_K": (-128, 127)}.get(kind, (0, 63))


def _multiples(values: Tensor, steps: Tensor, what: str, lowest: int, highest: int) -> Tensor:
    """float32 [N, blocks, groups] as int16 multiples of float16 [N, blocks]."""
    of = steps[..., None].float()
    multiples = torch.where(of == 0, 0.0, values / of).round()
    wrong = (multiples * of != values) | (multiples < lowest) | (multiples > highest)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"expected {what} to be whole multiples, {lowest} to {highest}, of the step of their superblock, but got "
            f"{values[at].item()!r} with step {steps[at[:2]].item()!r}"
        )
    return multiples.short()


def _bit_pairs(values: Tensor) -> Tensor:
    """2 bits each [.., 256] as [.., 64]: columns c, c + 32, c + 64, c + 96 of either half in a byte."""
    of_bytes = values.unflatten(2, (2, 4, 32))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    shifted: Tensor = of_bytes << shifts
    return shifted.sum(3, dtype=torch.uint8).flatten(2)


def _from_bit_pairs(stored: Tensor) -> Tensor:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    pairs: Tensor = stored.unflatten(2, (2, 1, 32)) >> shifts
    return (pairs & 3).flatten(2)


def _bit_planes(values: Tensor) -> Tensor:
    """1 bit each [.., 256] as [.., 32]: bit j of byte l is that of column 32 j + l."""
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    planes: Tensor = values.unflatten(2, (8, 32)) << shifts
    return planes.sum(2, dtype=torch.uint8)


def _from_bit_planes(stored: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    planes: Tensor = stored[:, :, None] >> shifts
    return (planes & 1).flatten(2)


def _packed_16(values: Tensor) -> Tensor:
    """16 numbers of 6 bits in 12 bytes: low halves of i, i + 8 in byte i, high pairs of i, i + 4, .. in byte 8 + i."""
    low, high = (values & 15).unflatten(2, (2, 8)), (values >> 4).unflatten(2, (4, 4))
    shifts = torch.arange(0, 8, 2, dtype=torch.int16)[:, None]
    pairs: Tensor = high << shifts
    return torch.cat([low[:, :, 0] | (low[:, :, 1] << 4), pairs.sum(2, dtype=torch.int16)], 2).to(torch.uint8)


def _from_packed_16(stored: Tensor) -> Tensor:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = ((stored[:, :, None, 8:] >> shifts) & 3).flatten(2)
    return torch.cat([stored[:, :, :8] & 15, stored[:, :, :8] >> 4], 2) | (high << 4)


def _packed_8(scales: Tensor, minima: Tensor) -> Tensor:
    """8 scales and 8 minima of 6 bits in 12 bytes.

    The first four of each whole, with the high pairs of the last four above them; then the low halves of the last four,
    the scale's below the minimum's.
    """
    first = [part[:, :, :4] | ((part[:, :, 4:] >> 4) << 6) for part in (scales, minima)]
    return torch.cat([*first, (scales[:, :, 4:] & 15) | ((minima[:, :, 4:] & 15) << 4)], 2).to(torch.uint8)


def _from_packed_8(stored: Tensor) -> tuple[Tensor, Tensor]:
    scales, minima, low = stored.split(4, 2)
    return (
        torch.cat([scales & 63, (low & 15) | ((scales >> 6) << 4)], 2),
        torch.cat([minima & 63, (low >> 4) | ((minima >> 6) << 4)], 2),
    )


def _bytes(steps: Tensor) -> Tensor:
    """float16 [N, blocks] as uint8 [N, blocks, 2]."""
    return steps.clone(memory_format=torch.contiguous_format)[..., None].view(torch.uint8)


def _halves(stored: Tensor) -> Tensor:
    """uint8 [N, blocks, 2] as float16 [N, blocks]."""
    return stored.clone(memory_format=torch.contiguous_format).view(torch.float16)[..., 0]
