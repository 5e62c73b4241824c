"""pack and unpack: codes of 2 to 8 bits without gaps; pack_int4 and unpack_int4: two codes per byte."""

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


def stream_of_bits(row: list[int], bits: int) -> list[int]:
    """The bytes of a row, from the definition: one little-endian number of all its bits."""
    number = sum((code % 2**bits) << (bits * k) for k, code in enumerate(row))
    return list(number.to_bytes((len(row) * bits + 7) // 8, "little"))


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 7, 8, 9, 64, 129])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_row_is_one_stream_of_bits(bits: int, columns: int) -> None:
    low = -(2 ** (bits - 1))
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(low, -low, (4, columns), generator=generator, dtype=torch.int8)
    packed = miniquant.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [stream_of_bits(row, bits) for row in codes.tolist()]
    assert torch.equal(miniquant.unpack(packed, bits, columns), codes)
    strided = codes.t().contiguous().t()
    assert miniquant.pack(strided, bits).is_contiguous()
    assert torch.equal(miniquant.pack(strided, bits), packed)
    assert miniquant.unpack(packed.t().contiguous().t(), bits, columns).is_contiguous()


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_of_every_width_round_trips(bits: int) -> None:
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8).repeat(3, 1)
    assert torch.equal(miniquant.unpack(miniquant.pack(codes, bits), bits, codes.shape[1]), codes)


def test_four_bits_are_pack_int4() -> None:
    codes = torch.randint(-8, 8, (5, 33), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = miniquant.pack(codes, 4)
    assert torch.equal(packed, miniquant.pack_int4(codes))
    assert torch.equal(miniquant.unpack(packed, 4, 33), miniquant.unpack_int4(packed, 33))


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_bytes_share_no_memory_with_codes(bits: int) -> None:
    codes = torch.ones(1, 8, dtype=torch.int8)
    packed = miniquant.pack(codes, bits)
    unpacked = miniquant.unpack(packed, bits, 8)
    codes.zero_()
    packed.zero_()
    assert unpacked.tolist() == [[1] * 8]


def test_pack_takes_a_quantized_weight_whole() -> None:
    quantized = miniquant.rtn(torch.randn(3, 10), bits=3, group_size=4)
    assert torch.equal(miniquant.pack(quantized), miniquant.pack(quantized.codes, 3))
    with pytest.raises(
        TypeError, match="pack: expected no bits beside a quantized weight, which knows them, but got 4"
    ):
        miniquant.pack(quantized, 4)  # type: ignore[call-overload]
