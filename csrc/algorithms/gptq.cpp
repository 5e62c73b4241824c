// GPTQ in the form without an inverse. Read gptq_reference.cpp first for the algorithm, then docs/algorithm.md for why
// the two forms are equivalent.

#include "algorithms/gptq.h"

#include <ATen/TensorOperators.h>

#include <utility>

#include "algorithms/damping.h"
#include "algorithms/grid.h"
#include "algorithms/refine.h"
#include "algorithms/row_loss.h"
#include "algorithms/sweep.h"

namespace miniquant::algorithms {

at::Tensor solve(const LayerProblem& problem, SweepFactor factor, const GptqOptions& options,
                 const at::Tensor& importance, Grid& grid) {
  const auto& [scaled, hessian, damping, dead] = problem;
  at::Tensor gradient = options.refine > 0 ? room_for_gradient(scaled.values) : at::Tensor();
  at::Tensor row_loss = sweep_rows(with_minima(scaled.values, grid), factor, options, grid, importance, gradient);
  factor = {};
  const at::Tensor swept_loss = row_loss;
  if (options.refine > 0) {
    row_loss = row_loss.clone();
    refine(hessian, damping, options.refine, grid, gradient, row_loss);
  }
  const at::Tensor target = with_minima(scaled.values, grid);
  const at::Tensor moved = round_dead_inputs(dead, target, grid);
  settle_row_loss(hessian, damping, target, grid, {.before = swept_loss, .moved = moved}, row_loss);
  return in_true_units(row_loss, scaled, damping);
}

GptqResult gptq(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options) {
  const ScaledWeight scaled = scaled_weight(weight, options.scales);
  const at::Tensor& values = scaled.values;
  const Damping damping = damping_of(hessian, options.ridge);

  SweepFactor factor = factor_for_sweep("gptq", hessian, damping, options, values.scalar_type());
  Grid grid = make_grid(weight, options, scaled.units);
  const at::Tensor dead = dead_inputs(hessian);
  hold_dead_inputs(dead, values, grid);
  const at::Tensor importance =
      options.scale_method == ScaleMethod::kHessian ? damped_diagonal(hessian, damping) : at::Tensor();
  const at::Tensor row_loss = solve({scaled, hessian, damping, dead}, std::move(factor), options, importance, grid);
  const QuantizationGrid& kind = options;
  return {{kind, grid.codes, grid.stored_scales(), grid.zero_points}, row_loss};
}

}  // namespace miniquant::algorithms
