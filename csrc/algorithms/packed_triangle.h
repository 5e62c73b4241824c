#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "kernels/strip_layout.h"

namespace miniquant::algorithms {

/// packed = the upper triangle, entry(i, j) for i <= j, in the order of `layout`.
template <typename T, typename Entry>
void pack_triangle(const kernels::StripLayout& layout, T* packed, const Entry& entry) {
  at::parallel_for(0, layout.strips(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = layout.strip_begin[strip];
      const int64_t last = layout.strip_begin[strip + 1];
      T* const rows = packed + layout.strip_offset[strip];
      std::fill_n(rows, (first + kernels::kStripColumns) * kernels::kStripColumns, T(0));
      for (int64_t j = first; j < last; ++j) {
        for (int64_t i = 0; i <= j; ++i) {
          rows[i * kernels::kStripColumns + (j - first)] = entry(i, j);
        }
      }
    }
  });
}

}  // namespace miniquant::algorithms
