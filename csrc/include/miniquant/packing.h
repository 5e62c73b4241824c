#pragma once

#include <ATen/core/Tensor.h>
#include <miniquant/export.h>

#include <cstdint>

namespace miniquant {

/// Two signed 4-bit codes per byte: [N, K] int8 in [-8, 7] -> [N, ceil(K / 2)] uint8. Column 2i is the low half of
/// byte i, in two's complement; the high half after an odd last column is 0.
/// Throws c10::ValueError for a code out of range or another shape, c10::TypeError for another dtype.
MINIQUANT_API at::Tensor pack_int4(const at::Tensor& codes);

/// The inverse of pack_int4: [N, ceil(K / 2)] uint8 -> [N, columns] int8. `columns` is K, which the
/// packed width leaves two choices for. Throws c10::ValueError / c10::TypeError on bad arguments.
MINIQUANT_API at::Tensor unpack_int4(const at::Tensor& packed, int64_t columns);

}  // namespace miniquant
