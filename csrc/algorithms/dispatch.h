#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "kernels/kernels.h"

// How the algorithms reach the kernels: by element type, over panels of rows, with aligned scratch memory.

namespace miniquant::algorithms {

/// Rows that one task takes: a multiple of every kernel's tile, and the same for any number of threads.
inline constexpr int64_t kPanelRows = 96;

/// The chosen instruction set's kernels for T.
template <typename T>
const kernels::TypedKernels<T>& typed_kernels() {
  return kernels::typed_kernels<T>(kernels::kernels());
}

/// body.operator()<float>() or <double>(), for a compute dtype.
template <typename Body>
void dispatch_compute(at::ScalarType dtype, const Body& body) {
  if (dtype == at::kDouble) {
    body.template operator()<double>();
  } else {
    TORCH_INTERNAL_ASSERT(dtype == at::kFloat, "not a compute dtype: ", dtype);
    body.template operator()<float>();
  }
}

/// body(row_begin, row_end) for panels of rows, in parallel.
template <typename Body>
void for_row_panels(int64_t rows, const Body& body) {
  const int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      body(panel * kPanelRows, std::min(rows, (panel + 1) * kPanelRows));
    }
  });
}

/// body(index) for 0 <= index < count, in parallel; for work that grows or shrinks steadily with the index. Pairs ends,
/// so that every contiguous share of the sequence is about the same work.
template <typename Body>
void for_triangle(int64_t count, const Body& body) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      body(i % 2 == 0 ? i / 2 : count - 1 - i / 2);
    }
  });
}

}  // namespace miniquant::algorithms
