"""Zeros in large pages of memory: a pass over a matrix with long rows then needs fewer address translations."""

import contextlib
import math
import mmap

import torch
from torch import Tensor

# Of x86-64, and of 64-bit ARM with pages of 4 KiB.
_LARGE_PAGE = 2 * 1024 * 1024
# Below it memory that was used before is set to 0 in less time than the system takes to give new memory.
_FEWEST_BYTES = 4 * _LARGE_PAGE


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """As ``torch.zeros`` on the CPU; in large pages where the system gives them on request (Linux)."""
    size = math.prod(shape) * dtype.itemsize
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < _FEWEST_BYTES:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    # Whole large pages, with room to begin at the beginning of one: in the rest of a page every small one is a fault.
    pages = -(-size // _LARGE_PAGE)
    memory = mmap.mmap(-1, (pages + 1) * _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages: the zeros are the same
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _LARGE_PAGE
    return torch.frombuffer(memoryview(memory)[begin : begin + size], dtype=dtype).view(shape)
