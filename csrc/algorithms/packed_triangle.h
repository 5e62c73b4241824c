#pragma once

#include <cstdint>

#include "algorithms/dispatch.h"
#include "kernels/strip_layout.h"

namespace miniquant::algorithms {

/// packed = the upper triangle, entry(i, j) for i <= j, in the order of `layout`.
template <typename T, typename Entry>
void pack_triangle(const kernels::StripLayout& layout, T* packed, const Entry& entry) {
  constexpr int64_t kWidth = kernels::kStripColumns;
  for_triangle(layout.strips(), [&](int64_t strip) {
    const int64_t first = layout.strip_begin[strip];
    const int64_t width = layout.strip_begin[strip + 1] - first;
    T* const rows = packed + layout.strip_offset[strip];
    for (int64_t i = 0; i < first + kWidth; ++i) {
      for (int64_t c = 0; c < kWidth; ++c) {
        rows[i * kWidth + c] = c < width && i <= first + c ? entry(i, first + c) : T(0);
      }
    }
  });
}

}  // namespace miniquant::algorithms
