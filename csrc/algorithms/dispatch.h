#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "kernels/kernels.h"

// How the algorithms reach the kernels: by element type, over tiles of rows, with aligned scratch memory.

namespace miniquant::algorithms {

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

/// body(row_begin, row_end) for the shares of `rows`, in parallel; shares begin at multiples of `tile_rows`.
template <typename Body>
void for_row_tiles(int64_t rows, int64_t tile_rows, const Body& body) {
  at::parallel_for(0, (rows + tile_rows - 1) / tile_rows, 1,
                   [&](int64_t begin, int64_t end) { body(begin * tile_rows, std::min(rows, end * tile_rows)); });
}

/// kernel(problem, row_begin, row_end, workspace) for the shares of `rows`, in parallel, each with a workspace of its
/// own of as many T as workspace_of(problem, rows of the share) says.
template <typename T, typename Problem>
void run_on_rows(int64_t rows, const Problem& problem, int64_t (*workspace_of)(const Problem& problem, int64_t rows),
                 void (*kernel)(const Problem& problem, int64_t row_begin, int64_t row_end, T* workspace)) {
  for_row_tiles(rows, typed_kernels<T>().tile_rows, [&](int64_t row_begin, int64_t row_end) {
    const at::Tensor workspace =
        at::empty({workspace_of(problem, row_end - row_begin)}, c10::CppTypeToScalarType<T>::value);
    kernel(problem, row_begin, row_end, workspace.mutable_data_ptr<T>());
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
