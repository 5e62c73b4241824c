#pragma once

#include <ATen/core/Tensor.h>
#include <miniquant/export.h>

#include <cstdint>

namespace miniquant {

/// Packs codes of `bits` bits, 2 to 8, without gaps: int8 [N, K] -> uint8 [N, ceil(K * bits / 8)].
///
/// A row is one little-endian stream of bits: bit i of column k, in two's complement, is bit k * bits + i of the row,
/// and bit j of the row is bit j % 8 of byte j / 8. Unused bits of the last byte are 0. Throws c10::ValueError for a
/// code outside [-2^(bits-1), 2^(bits-1) - 1] or a wrong shape, c10::TypeError for a wrong dtype.
MINIQUANT_API at::Tensor pack(const at::Tensor& codes, int64_t bits);

/// The inverse of pack(): uint8 [N, ceil(K * bits / 8)] -> int8 [N, K], with K = `columns`.
/// Throws c10::ValueError where the packed width does not match `columns` or another argument is wrong, c10::TypeError
/// for a wrong dtype.
MINIQUANT_API at::Tensor unpack(const at::Tensor& packed, int64_t bits, int64_t columns);

/// pack() with 4 bits: two codes per byte, column 2i in the low half of byte i.
MINIQUANT_API at::Tensor pack_int4(const at::Tensor& codes);

/// unpack() with 4 bits.
MINIQUANT_API at::Tensor unpack_int4(const at::Tensor& packed, int64_t columns);

}  // namespace miniquant
