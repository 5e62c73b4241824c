// GPTQ in the form without an inverse. Read gptq_reference.cpp first for the algorithm, then docs/algorithm.md for why
// this is the same; the loop itself is kernels/sweep.inl.

#include "algorithms/gptq.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

#include "algorithms/damping.h"
#include "algorithms/dispatch.h"
#include "algorithms/factorization.h"
#include "algorithms/grid.h"
#include "algorithms/packed_triangle.h"
#include "kernels/strip_layout.h"

namespace miniquant::algorithms {
namespace {

/// H = R R^T in the order of the sweep, as the sweep reads it.
struct SweepFactor {
  at::Tensor column;         ///< int64 [K], the stored column of each step
  at::Tensor packed;         ///< compute dtype, C[i, j] = R_ij / R_jj packed by a StripLayout
  at::Tensor pivot_squared;  ///< compute dtype [K], R_jj^2; 0 where the damped Hessian's diagonal is 0
};

/// Static scales: blocks are single segments. Dynamic scales: a segment is a group, a block as many whole groups as
/// fit.
kernels::StripLayout layout_of_sweep(int64_t columns, const GptqOptions& options) {
  const int64_t block_columns = std::min(options.block_size, std::max<int64_t>(columns, 1));
  if (options.group_scales == GroupScales::kStatic) {
    return kernels::make_strip_layout(columns, block_columns, 1);
  }
  const int64_t group_columns = columns_per_group(options.group_size, columns);
  return kernels::make_strip_layout(columns, group_columns, std::max<int64_t>(1, block_columns / group_columns));
}

SweepFactor factor_for_sweep(const at::Tensor& hessian, const GptqOptions& options, at::ScalarType dtype,
                             const kernels::StripLayout& layout) {
  const int64_t columns = hessian.size(0);
  const at::Tensor column = order_of_columns(hessian, options.column_order);
  const double added = added_to_diagonal(hessian, options.ridge);
  const at::Tensor factor = damped_lower_triangle(hessian, added, column);
  if (!factor_from_last_row(factor)) {
    throw_not_positive_definite("gptq", damp(hessian, options.ridge, at::kDouble));
  }

  const at::Tensor packed = at::empty({layout.packed_size}, factor.options().dtype(dtype));
  const double* const l = factor.const_data_ptr<double>();  // L[j, i] = R[i, j]
  dispatch_compute(dtype, [&]<typename T> {
    pack_triangle(layout, packed.mutable_data_ptr<T>(),
                  [&](int64_t i, int64_t j) { return static_cast<T>(l[j * columns + i] / l[j * columns + j]); });
  });
  const at::Tensor damped_diagonal = hessian.diagonal().index_select(0, column).to(at::kDouble) + added;
  const at::Tensor pivot_squared = factor.diagonal().square().mul(damped_diagonal != 0).to(dtype);
  return {column, packed, pivot_squared};
}

/// Sets the grid's codes (and its scales, if they are dynamic) and returns the loss of each row.
template <typename T>
at::Tensor sweep_rows(const at::Tensor& weight, const SweepFactor& factor, const kernels::StripLayout& layout,
                      bool dynamic_scales, const Grid& grid) {
  const int64_t rows = weight.size(0);
  const at::Tensor row_loss = at::empty({rows}, weight.options());
  int64_t max_block_columns = 0;
  for (size_t block = 0; block + 1 < layout.block_begin.size(); ++block) {
    max_block_columns = std::max(max_block_columns, layout.block_begin[block + 1] - layout.block_begin[block]);
  }
  const kernels::SweepProblem<T> problem{.columns = weight.size(1),
                                         .weight = weight.const_data_ptr<T>(),
                                         .grid = view<T>(grid),
                                         .dynamic_scales = dynamic_scales,
                                         .column = factor.column.const_data_ptr<int64_t>(),
                                         .pivot_squared = factor.pivot_squared.const_data_ptr<T>(),
                                         .packed = factor.packed.const_data_ptr<T>(),
                                         .block_begin = layout.block_begin.data(),
                                         .segment_begin = layout.segment_begin.data(),
                                         .strip_begin = layout.strip_begin.data(),
                                         .strip_offset = layout.strip_offset.data(),
                                         .max_block_columns = max_block_columns,
                                         .row_loss = row_loss.mutable_data_ptr<T>()};
  const auto& kernel = typed_kernels<T>();
  for_row_panels(rows, [&](int64_t row_begin, int64_t row_end) {
    const at::Tensor workspace = at::empty({kernel.sweep_workspace(problem, row_end - row_begin)}, weight.options());
    kernel.sweep(problem, row_begin, row_end, workspace.mutable_data_ptr<T>());
  });
  return row_loss;
}

}  // namespace

at::Tensor order_of_columns(const at::Tensor& hessian, ColumnOrder order) {
  if (order == ColumnOrder::kNatural) {
    return at::arange(hessian.size(0), hessian.options().dtype(at::kLong));
  }
  return hessian.diagonal().argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
}

GptqResult gptq(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options) {
  const at::ScalarType dtype = compute_dtype(weight.scalar_type());
  const at::Tensor values = weight.to(dtype).contiguous();
  const bool dynamic_scales = options.group_scales == GroupScales::kDynamic;

  const kernels::StripLayout layout = layout_of_sweep(values.size(1), options);
  const SweepFactor factor = factor_for_sweep(hessian, options, dtype, layout);
  Grid grid =
      make_grid(weight, options.bits, options.group_size, options.symmetric, options.scales, options.zero_points);
  if (!dynamic_scales && !options.scales.has_value()) {
    compute_scales(grid, values);
  }
  at::Tensor row_loss;
  dispatch_compute(dtype, [&]<typename T> { row_loss = sweep_rows<T>(values, factor, layout, dynamic_scales, grid); });
  return {{grid.codes, grid.stored_scales(), grid.zero_points}, row_loss};
}

}  // namespace miniquant::algorithms
