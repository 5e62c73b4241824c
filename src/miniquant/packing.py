"""Codes as they are stored: several to a byte."""

from typing import cast

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """Two signed 4-bit codes per byte, in two's complement.

    Column 2i is the low half of byte i and column 2i + 1 the high half; the high half after an odd last column is 0.

    Args:
        codes: int8 [N, K], values in [-8, 7].

    Returns:
        uint8 [N, ceil(K / 2)].

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    return cast("Tensor", torch.ops.miniquant.pack_int4(codes))


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_int4`.

    Args:
        packed: uint8 [N, ceil(columns / 2)].
        columns: K.

    Returns:
        int8 [N, columns].

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    return cast("Tensor", torch.ops.miniquant.unpack_int4(packed, columns))
