// GPTQ in the form without an inverse. Read gptq_reference.cpp first for the algorithm, then docs/algorithm.md for why
// this is the same; the loop itself is kernels/sweep-inl.h.

#include "algorithms/gptq.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "algorithms/damping.h"
#include "algorithms/dispatch.h"
#include "algorithms/factorization.h"
#include "algorithms/grid.h"
#include "algorithms/refine.h"
#include "algorithms/symmetric.h"

namespace miniquant::algorithms {
namespace {

/// H = R R^T in the order of the sweep.
struct SweepFactor {
  at::Tensor column;         ///< int64 [K], the stored column of each step
  at::Tensor triangle;       ///< compute dtype, L = R^T as lower_triangle() lays it out
  at::Tensor pivot;          ///< compute dtype [K], R_jj
  at::Tensor pivot_squared;  ///< compute dtype [K], R_jj^2; 0 where the damped Hessian's diagonal is 0
};

/// A pivot's square is what is left of a diagonal entry H_jj after products of about its size were subtracted, each
/// with a rounding error, which H_jj / R_jj^2 therefore magnifies. Where it does so more than this in the mean over the
/// columns, a float32 factor has lost so many digits that the loss can move by a thousandth, and float64 is used
/// instead.
constexpr double kLargestFloat32Magnification = 200;

/// The mean of H_jj / R_jj^2.
double magnification_of_errors(const at::Tensor& pivot, const at::Tensor& diagonal) {
  return pivot.numel() == 0 ? 1.0 : (diagonal.to(at::kDouble) / pivot.to(at::kDouble).square()).mean().item<double>();
}

/// Factors the damped Hessian in `dtype`. Returns whether that went well enough.
bool factor_in(at::ScalarType dtype, const at::Tensor& hessian, double added, SweepFactor& factor) {
  const int64_t columns = hessian.size(0);
  factor.triangle = damped_lower_triangle(hessian, added, dtype, factor.column);
  const at::Tensor diagonal = diagonal_of_triangle(factor.triangle, columns);
  if (!factor_from_last_row(factor.triangle, columns)) {
    return false;
  }
  factor.pivot = diagonal_of_triangle(factor.triangle, columns);
  return dtype == at::kDouble || magnification_of_errors(factor.pivot, diagonal) <= kLargestFloat32Magnification;
}

SweepFactor factor_for_sweep(const at::Tensor& hessian, const GptqOptions& options, at::ScalarType dtype) {
  SweepFactor factor;
  if (options.column_order != ColumnOrder::kNatural) {
    factor.column = order_of_columns(hessian, options.column_order, options.group_size);
  }
  const double added = added_to_diagonal(hessian, options.ridge);
  if (!factor_in(dtype, hessian, added, factor)) {
    factor.triangle.reset();
    if (dtype == at::kDouble || !factor_in(at::kDouble, hessian, added, factor)) {
      throw_not_positive_definite("gptq", damp(hessian, options.ridge, at::kDouble));
    }
    factor.triangle = factor.triangle.to(dtype);
    factor.pivot = factor.pivot.to(dtype);
  }
  if (!factor.column.defined()) {
    factor.column = order_of_columns(hessian, options.column_order, options.group_size);
  }
  const at::Tensor damped_diagonal = hessian.diagonal().index_select(0, factor.column).to(at::kDouble) + added;
  factor.pivot_squared = factor.pivot.square().mul(damped_diagonal != 0);
  return factor;
}

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

/// Sets the grid's codes (and its scales, if they are dynamic) and `gradient`, if it is defined, to refine()'s.
/// Returns the loss of each row.
template <typename T>
at::Tensor sweep_rows(const at::Tensor& weight, const SweepFactor& factor, const GptqOptions& options, const Grid& grid,
                      const at::Tensor& gradient) {
  const int64_t rows = weight.size(0);
  const int64_t columns = weight.size(1);
  const bool dynamic_scales = options.group_scales == GroupScales::kDynamic;
  // A segment is a group whose scale is taken when it is reached, and a block as many of them as fit.
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
  const auto& kernel = typed_kernels<T>();
  run_on_rows(rows, columns * columns / 2, problem, kernel.sweep_workspace, kernel.sweep);
  return row_loss;
}

/// Groups with more columns than this keep the order of their diagonal: finding a better one takes their cube.
constexpr int64_t kMostColumnsToOrder = 512;

/// Orders the columns of a group, from the last: that of least H_jj, then each time the one of least variance given
/// those behind it. What is left of a column's variance when it is quantized weighs its rounding error; it is most even
/// over the columns this way. `group` [G, G] is overwritten.
std::vector<int64_t> order_within_group(at::TensorAccessor<double, 2> group) {
  const int64_t columns = group.size(0);
  std::vector<int64_t> place(columns);
  std::iota(place.begin(), place.end(), 0);
  for (int64_t last = columns - 1; last > 0; --last) {
    // Of equals the last: columns without inputs stay in their order.
    const auto least = std::min_element(place.rbegin() + (columns - 1 - last), place.rend(),
                                        [&](int64_t a, int64_t b) { return group[a][a] < group[b][b]; });
    std::rotate(least.base() - 1, least.base(), place.begin() + last + 1);
    const int64_t taken = place[last];
    const double variance = group[taken][taken];
    for (int64_t a = 0; variance > 0 && a < last; ++a) {
      const double share = group[place[a]][taken] / variance;
      for (int64_t b = 0; b < last; ++b) {
        group[place[a]][place[b]] -= share * group[place[b]][taken];
      }
    }
  }
  return place;
}

/// The columns of every group in turn, in stored order of groups.
at::Tensor order_within_groups(const at::Tensor& hessian, int64_t group_columns) {
  const int64_t columns = hessian.size(0);
  const at::Tensor order = at::empty({columns}, hessian.options().dtype(at::kLong));
  int64_t* const to = order.mutable_data_ptr<int64_t>();
  const int64_t operations = columns * group_columns * group_columns / 3;
  for_pieces((columns + group_columns - 1) / group_columns, operations, [&](int64_t piece) {
    const int64_t begin = piece * group_columns;
    const int64_t count = std::min(group_columns, columns - begin);
    const at::Tensor group = hessian.narrow(0, begin, count).narrow(1, begin, count).to(at::kDouble, false, true);
    const std::vector<int64_t> place = order_within_group(group.accessor<double, 2>());
    std::ranges::transform(place, to + begin, [&](int64_t column) { return begin + column; });
  });
  return order;
}

}  // namespace

at::Tensor order_of_columns(const at::Tensor& hessian, ColumnOrder order, int64_t group_size) {
  const int64_t columns = hessian.size(0);
  if (order == ColumnOrder::kNatural) {
    return at::arange(columns, hessian.options().dtype(at::kLong));
  }
  at::Tensor by_diagonal = hessian.diagonal().argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
  if (order == ColumnOrder::kActivation || columns == 0) {
    return by_diagonal;
  }
  const int64_t group_columns = columns_per_group(group_size, columns);
  std::vector<at::Tensor> means;
  for (const at::Tensor& group : hessian.diagonal().to(at::kDouble).split(group_columns)) {
    means.push_back(group.mean());
  }
  if (columns % group_columns != 0) {
    // A shorter last group comes last: every other then takes as many steps of the sweep.
    means.back() = at::full_like(means.back(), -std::numeric_limits<double>::infinity());
  }
  const at::Tensor place_of_group = at::stack(means).argsort(true, 0, /*descending=*/true).argsort();
  const at::Tensor within =
      group_columns > kMostColumnsToOrder ? by_diagonal : order_within_groups(hessian, group_columns);
  const at::Tensor place = place_of_group.index_select(0, within.div(group_columns, "floor"));
  return within.index_select(0, place.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false));
}

GptqResult gptq(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options) {
  const at::ScalarType dtype = compute_dtype(weight.scalar_type());
  const at::Tensor values = weight.to(dtype).contiguous();

  SweepFactor factor = factor_for_sweep(hessian, options, dtype);
  Grid grid = make_grid(weight, options);
  if (options.group_scales == GroupScales::kStatic && !options.scales.has_value()) {
    compute_scales(grid, values, options.scale_method, hessian);
  }
  at::Tensor gradient = options.refine > 0 ? room_for_gradient(values) : at::Tensor();
  at::Tensor row_loss;
  dispatch_compute(dtype, [&]<typename T> { row_loss = sweep_rows<T>(values, factor, options, grid, gradient); });
  factor = {};
  if (options.refine > 0) {
    refine(hessian, options.ridge, options.refine, grid, gradient, row_loss);
  }
  return {{options, grid.codes, grid.stored_scales(), grid.zero_points}, row_loss};
}

}  // namespace miniquant::algorithms
