// The factor of the damped Hessian, and the sweep that reads it. The loop itself is in kernels/sweep-inl.h.

#include "algorithms/sweep.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "algorithms/column_order.h"
#include "algorithms/damping.h"
#include "algorithms/dispatch.h"
#include "algorithms/factorization.h"
#include "algorithms/grid.h"
#include "algorithms/symmetric.h"

namespace miniquant::algorithms {
namespace {

/// Max mean of H_jj / R_jj^2 for a float32 factor. R_jj^2 is the remainder of H_jj after subtracting products of about
/// the size of H_jj, so H_jj / R_jj^2 magnifies their rounding errors. If the mean over columns is larger, a float32
/// factor has lost so many digits that the loss can change by a thousandth, and float64 is used.
constexpr double kLargestFloat32Magnification = 200;

/// The mean of H_jj / R_jj^2, of float32 tensors.
double magnification_of_errors(const at::Tensor& pivot, const at::Tensor& diagonal) {
  const int64_t columns = pivot.numel();
  const auto* const r = pivot.const_data_ptr<float>();
  const auto* const h = diagonal.const_data_ptr<float>();
  double sum = 0.0;
  for (int64_t j = 0; j < columns; ++j) {
    const auto pivot_j = static_cast<double>(r[j]);
    sum += static_cast<double>(h[j]) / (pivot_j * pivot_j);
  }
  return columns == 0 ? 1.0 : sum / static_cast<double>(columns);
}

/// Factors the damped Hessian in `dtype`. `without_pivot`, bool [K]: steps whose diagonal entry is 0; undefined if
/// there are none. Returns whether the factorization succeeded and `dtype` is accurate enough.
bool factor_in(at::ScalarType dtype, const at::Tensor& hessian, const Damping& damping, const at::Tensor& without_pivot,
               SweepFactor& factor) {
  const int64_t columns = hessian.size(0);
  at::Tensor diagonal = diagonal_of_damped_triangle(hessian, damping, dtype, factor.column);
  if (without_pivot.defined()) {
    diagonal.masked_fill_(without_pivot, 1);
  }
  bool factored = false;
  if (factor.column.defined()) {
    factor.triangle = damped_lower_triangle(hessian, damping, dtype, factor.column);
    set_diagonal_of_triangle(factor.triangle, diagonal);
    factored = factor_from_last_row(factor.triangle, columns);
  } else {
    const LowerTriangleRows rows(hessian, damping.factor, dtype, diagonal);
    factor.triangle = rows.triangle();
    factored = factor_from_last_row(factor.triangle, columns, [&](int64_t panel) { rows.set(panel); });
  }
  if (!factored) {
    return false;
  }
  factor.pivot = diagonal_of_triangle(factor.triangle, columns);
  return dtype == at::kDouble || magnification_of_errors(factor.pivot, diagonal) <= kLargestFloat32Magnification;
}

}  // namespace

SweepFactor factor_for_sweep(const char* op, const at::Tensor& hessian, const Damping& damping,
                             const GptqOptions& options, at::ScalarType dtype) {
  check_dead_inputs(op, hessian, damping);
  SweepFactor factor;
  const at::Tensor column = order_of_columns(hessian, options.column_order, options.group_size);
  if (options.column_order != ColumnOrder::kNatural) {
    factor.column = column;
  }
  // A dead input without a ridge has a zero row and column: any pivot leaves it decoupled.
  const at::Tensor without_pivot =
      damping.added > 0 ? at::Tensor() : damped_diagonal(hessian, damping).index_select(0, column) == 0;
  if (!factor_in(dtype, hessian, damping, without_pivot, factor)) {
    factor.triangle.reset();
    if (dtype == at::kDouble || !factor_in(at::kDouble, hessian, damping, without_pivot, factor)) {
      throw_not_positive_definite(op, hessian, damping);
    }
    factor.triangle = factor.triangle.to(dtype);
    factor.pivot = factor.pivot.to(dtype);
  }
  factor.column = column;
  factor.pivot_squared = factor.pivot.square();
  if (without_pivot.defined()) {
    factor.pivot_squared.masked_fill_(without_pivot, 0);
  }
  return factor;
}

namespace {

template <typename T>
std::vector<kernels::SweepStep<T>> steps_of_sweep(const SweepFactor& factor, int64_t group_size) {
  const int64_t* const column = factor.column.const_data_ptr<int64_t>();
  const T* const pivot = factor.pivot.const_data_ptr<T>();
  const T* const pivot_squared = factor.pivot_squared.const_data_ptr<T>();
  std::vector<kernels::SweepStep<T>> steps(factor.column.size(0));
  for (size_t j = 0; j < steps.size(); ++j) {
    steps[j] = {column[j], column[j] / group_size, T(1) / pivot[j], pivot_squared[j]};
  }
  return steps;
}

template <typename T>
at::Tensor sweep_rows_as(const at::Tensor& weight, const SweepFactor& factor, const GptqOptions& options,
                         const Grid& grid, const at::Tensor& importance, const at::Tensor& gradient) {
  const int64_t rows = weight.size(0);
  const int64_t columns = weight.size(1);
  const bool dynamic_scales = options.group_scales == GroupScales::kDynamic;
  // With dynamic scales a segment is one group; a block holds as many segments as fit.
  const int64_t block_columns = std::clamp<int64_t>(options.block_size, 1, std::max<int64_t>(columns, 1));
  const int64_t segment_columns = dynamic_scales ? grid.group_size : block_columns;
  const std::vector<kernels::SweepStep<T>> steps = steps_of_sweep<T>(factor, grid.group_size);
  const std::vector<T> factors = scale_factors<T>(grid.range, options.scale_method);
  const at::Tensor row_loss = at::empty({rows}, weight.options());
  const kernels::SweepProblem<T> problem{
      .columns = columns,
      .weight = weight.const_data_ptr<T>(),
      .grid = view<T>(grid),
      .dynamic_scales = dynamic_scales,
      .search = {factors.data(), static_cast<int64_t>(factors.size()), nullptr},
      .beam_scales = options.beam_scales,
      .steps = steps.data(),
      .triangle = factor.triangle.const_data_ptr<T>(),
      .segment_columns = segment_columns,
      .block_columns = std::max<int64_t>(1, block_columns / segment_columns) * segment_columns,
      .row_loss = row_loss.mutable_data_ptr<T>(),
      .gradient = gradient.defined() ? gradient.mutable_data_ptr<T>() : nullptr};
  std::optional<ScalesOfRows<T>> static_scales;
  if (!dynamic_scales && !options.scales.has_value()) {
    static_scales.emplace(grid, weight, options.scale_method, importance);
  }
  const auto& kernel = typed_kernels<T>();
  run_on_rows<T>(rows, columns * columns / 2 + (static_scales ? static_scales->operations() : 0), problem,
                 kernel.sweep_workspace,
                 [&](const kernels::SweepProblem<T>& sweep, int64_t row_begin, int64_t row_end, T* workspace) {
                   if (static_scales) {
                     static_scales->set(row_begin, row_end);
                   }
                   kernel.sweep(sweep, row_begin, row_end, workspace);
                 });
  return row_loss;
}

}  // namespace

at::Tensor sweep_rows(const at::Tensor& weight, const SweepFactor& factor, const GptqOptions& options, const Grid& grid,
                      const at::Tensor& importance, const at::Tensor& gradient) {
  at::Tensor row_loss;
  dispatch_compute(weight.scalar_type(), [&]<typename T> {
    row_loss = sweep_rows_as<T>(weight, factor, options, grid, importance, gradient);
  });
  return row_loss;
}

}  // namespace miniquant::algorithms
