"""pack_int4 and unpack_int4: two signed codes per byte."""

from __future__ import annotations

import pytest
import torch

import miniquant


def test_every_pair_of_codes_round_trips() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8)
    codes = torch.cartesian_prod(values, values)
    packed = miniquant.pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (256, 1)
    assert packed.unique().numel() == 256
    assert torch.equal(miniquant.unpack_int4(packed, 2), codes)


def test_every_byte_round_trips() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    codes = miniquant.unpack_int4(packed, 32)
    assert (int(codes.min()), int(codes.max())) == (-8, 7)
    assert torch.equal(miniquant.pack_int4(codes), packed)


def test_the_layout() -> None:
    """The even column is the low half, in two's complement; the half after an odd last column is 0."""
    codes = torch.tensor([[1, 2, -1], [-8, 7, 5]], dtype=torch.int8)
    assert miniquant.pack_int4(codes).tolist() == [[0x21, 0x0F], [0x78, 0x05]]


@pytest.mark.parametrize("columns", [0, 1, 2, 3, 64, 129])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_any_shape_and_layout(rows: int, columns: int) -> None:
    codes = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = miniquant.pack_int4(codes)
    assert packed.shape == (rows, (columns + 1) // 2)
    unpacked = miniquant.unpack_int4(packed, columns)
    assert unpacked.is_contiguous()
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes)
    strided = torch.stack([codes, codes], dim=2)[..., 1]
    assert torch.equal(miniquant.pack_int4(strided), packed)
    assert torch.equal(strided, codes)
    assert torch.equal(miniquant.unpack_int4(packed.t().contiguous().t(), columns), codes)


def test_does_not_alias_its_input() -> None:
    codes = torch.tensor([[1, 2]], dtype=torch.int8)
    packed = miniquant.pack_int4(codes)
    codes.fill_(0)
    assert packed.tolist() == [[0x21]]
