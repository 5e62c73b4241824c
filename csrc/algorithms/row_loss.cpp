#include "algorithms/row_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/round.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <cstdint>

#include "algorithms/loss.h"
#include "algorithms/power_of_two.h"

namespace miniquant::algorithms {
namespace {

/// A loss that fell below this fraction of its earlier value has lost too many digits to cancellation.
constexpr double kLargestCancellation = 0x1p-12;

/// The errors weight - dequantized of the rows `rows` (int64), float64 [rows, K].
at::Tensor error_of_rows(const at::Tensor& rows, const at::Tensor& weight, const Grid& grid) {
  const auto chosen = [&](const at::Tensor& tensor) { return tensor.index_select(0, rows).to(at::kDouble); };
  const auto per_column = [&](const at::Tensor& per_group) {
    return per_group.repeat_interleave(grid.group_size, /*dim=*/1).narrow(1, 0, weight.size(1));
  };
  const at::Tensor levels = chosen(grid.codes) - per_column(chosen(grid.zero_points));
  return (chosen(weight) - levels * per_column(chosen(grid.scales))).contiguous();
}

}  // namespace

at::Tensor round_dead_inputs(const at::Tensor& dead, const at::Tensor& weight, Grid& grid) {
  if (dead.numel() == 0) {
    return at::zeros({weight.size(0)}, weight.options().dtype(at::kBool));
  }
  const at::Tensor group = dead.div(grid.group_size, "floor");
  const at::Tensor zero_point = grid.zero_points.index_select(1, group).to(weight.scalar_type());
  const at::Tensor level = weight.index_select(1, dead).div_(grid.scales.index_select(1, group)).round_();
  const at::Tensor code = level.add_(zero_point).clamp_(grid.range.code_min, grid.range.code_max).to(at::kChar);
  at::Tensor moved = grid.codes.index_select(1, dead).ne(code).any(1);
  grid.codes.index_copy_(1, dead, code);
  return moved;
}

void settle_row_loss(const at::Tensor& hessian, const Damping& damping, const at::Tensor& weight, const Grid& grid,
                     const LossHistory& history, at::Tensor& row_loss) {
  const at::Tensor cancelled = row_loss.lt(history.before * kLargestCancellation);
  const at::Tensor rows = cancelled.logical_or(row_loss < 0).logical_or_(history.moved).nonzero().flatten();
  if (rows.numel() == 0) {
    return;
  }
  const at::Tensor triangle = damped_lower_triangle(hessian, damping, at::kDouble);
  // D is positive definite, so only rounding makes the form negative.
  const at::Tensor exact = quadratic_forms(error_of_rows(rows, weight, grid), triangle).clamp_min_(0);
  const at::Tensor before = history.before.index_select(0, rows);
  const at::Tensor loss = exact.to(row_loss.scalar_type());
  row_loss.index_copy_(0, rows, at::where(before < 0, loss, at::minimum(loss, before)));
}

at::Tensor in_true_units(const at::Tensor& row_loss, const ScaledWeight& weight, const Damping& damping) {
  if (!weight.exponents.defined()) {
    return times_power_of_two(row_loss, damping.exponent);
  }
  return times_power_of_two(row_loss, weight.exponents * 2 + damping.exponent);
}

}  // namespace miniquant::algorithms
