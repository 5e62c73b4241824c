"""Packed codes: stored without gaps between their bits."""

from typing import cast, overload

import torch
from torch import Tensor

from miniquant.grid import QuantizedWeight
from miniquant.operators import call


@overload
def pack(codes: QuantizedWeight) -> Tensor: ...


@overload
def pack(codes: Tensor, bits: int) -> Tensor: ...


def pack(codes: Tensor | QuantizedWeight, bits: int | None = None) -> Tensor:
    """Packs codes of ``bits`` bits without gaps.

    A row is one little-endian stream of bits: bit i of column k, in two's complement, is bit ``k * bits + i`` of the
    row, and bit j of the row is bit ``j % 8`` of byte ``j // 8``. Unused bits of the last byte are 0.

    Args:
        codes: a whole :class:`miniquant.QuantizedWeight`, without further arguments; or int8 [N, K] with values in
            [-2^(bits - 1), 2^(bits - 1) - 1].
        bits: 2 to 8.

    Returns:
        uint8 [N, ceil(K * bits / 8)].

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    if isinstance(codes, QuantizedWeight):
        if bits is not None:
            raise TypeError(f"pack: expected no bits beside a quantized weight, which knows them, but got {bits!r}")
        return cast("Tensor", call("pack", codes.codes, codes.bits))
    return cast("Tensor", call("pack", codes, bits))


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of :func:`pack`.

    Args:
        packed: uint8 [N, ceil(columns * bits / 8)].
        bits: 2 to 8.
        columns: K.

    Returns:
        int8 [N, columns].

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    return cast("Tensor", call("unpack", packed, bits, columns))


def pack_int4(codes: Tensor) -> Tensor:
    """:func:`pack` with 4 bits: two codes per byte, column 2i in the low half of byte i."""
    return cast("Tensor", call("pack_int4", codes))


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_int4`: :func:`unpack` with 4 bits."""
    return cast("Tensor", call("unpack_int4", packed, columns))


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes as unsigned integers without gaps in words of 32 bits, as several checkpoint formats store them.

    The integer of a code is ``code + 2^(bits - 1)``; bit i of that of column k is bit ``(k * bits + i) % 32`` of word
    ``(k * bits + i) // 32`` of the row. What is left of the last word is 0. The machine is a little-endian one.

    Args:
        codes: int8 [N, K], values in [-2^(bits - 1), 2^(bits - 1) - 1].
        bits: 2 to 8.

    Returns:
        int32 [N, ceil(K * bits / 32)].

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    packed = pack(codes ^ -(1 << (bits - 1)), bits)  # adds 2^(bits - 1) to the lowest bits, modulo 2^bits
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of :func:`pack_words`.

    Args:
        words: int32 [N, ceil(columns * bits / 32)].
        bits: 2 to 8.
        columns: K.

    Returns:
        int8 [N, columns].

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    words = words.clone(memory_format=torch.contiguous_format)  # a single column may have any stride, and be contiguous
    packed = words.view(torch.uint8)[:, : -(-columns * bits // 8)]
    return unpack(packed.contiguous(), bits, columns) ^ -(1 << (bits - 1))
