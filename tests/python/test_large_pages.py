"""Memory in large pages: zeros from Python, and what operators return."""

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miniquant import HessianAccumulator, large_pages


def asks_for_large_pages(tensor: Tensor) -> bool:
    """Whether the middle of a tensor's memory has the flag "hg", huge page advise (proc(5), VmFlags)."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping has the tensor")


needs_large_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="needs a kernel with transparent huge pages"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, 1100, 1100)])
def test_zeros_are_zeros_of_the_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    zeros = large_pages.zeros(*shape, dtype=dtype)
    assert zeros.shape == shape
    assert zeros.dtype == dtype
    assert zeros.is_contiguous()
    assert not zeros.any()
    assert bool((zeros.add_(1) == 1).all())


def test_large_zeros_begin_with_a_page_and_save_as_they_are() -> None:
    zeros = large_pages.zeros(1500, 1501, dtype=torch.float32)
    assert zeros.data_ptr() % (2 << 20) == 0
    assert zeros.untyped_storage().nbytes() == zeros.nbytes


@needs_large_pages
def test_large_zeros_and_hessians_are_in_large_pages() -> None:
    columns = 2100
    assert asks_for_large_pages(large_pages.zeros(columns, columns, dtype=torch.float32))
    # Not torch.zeros: what an operator asked for may lie in the heap, and stays asked for when it is freed.
    other = torch.frombuffer(mmap.mmap(-1, 4 * columns**2), dtype=torch.float32)
    assert not asks_for_large_pages(other)
    accumulator = HessianAccumulator(columns, halves=True)
    for _ in range(2):
        accumulator.update(torch.ones(1, columns))
    assert asks_for_large_pages(accumulator.hessian())
