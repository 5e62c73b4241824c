#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>

#include "kernels/triangle.h"

namespace miniquant::testing {

/// The dense matrix [K, K] of a triangle of K = `columns` columns, 0 above the diagonal.
inline at::Tensor dense_triangle(const at::Tensor& triangle, std::int64_t columns) {
  const kernels::TriangleLayout layout{columns};
  at::Tensor dense = at::zeros({columns, columns}, triangle.options());
  for (std::int64_t panel = 0; panel < layout.panels(); ++panel) {
    const std::int64_t begin = panel * kernels::kPanelColumns;
    const std::int64_t width = std::min(kernels::kPanelColumns, columns - begin);
    const at::Tensor rows = triangle.narrow(0, layout.offset(begin, panel), (columns - begin) * kernels::kPanelColumns)
                                .view({columns - begin, kernels::kPanelColumns});
    dense.narrow(0, begin, columns - begin).narrow(1, begin, width).copy_(rows.narrow(1, 0, width));
  }
  return dense.tril();
}

}  // namespace miniquant::testing
