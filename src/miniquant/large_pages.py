"""Zeros in large pages of memory: a pass over a matrix with long rows then needs fewer address translations."""

import contextlib
import math
import mmap

import torch
from torch import Tensor

# Of x86-64, and of 64-bit ARM with pages of 4 KiB.
_LARGE_PAGE = 2 * 1024 * 1024


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """As ``torch.zeros`` on the CPU; in large pages where the system gives them on request (Linux)."""
    size = math.prod(shape) * dtype.itemsize
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < 2 * _LARGE_PAGE:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages: the zeros are the same
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
