// GPTQ in the form without an inverse. Read gptq_reference.cpp first for the algorithm, then docs/algorithm.md for why
// the two forms are equivalent.

#include "algorithms/gptq.h"

#include <ATen/TensorOperators.h>

#include "algorithms/damping.h"
#include "algorithms/grid.h"
#include "algorithms/refine.h"
#include "algorithms/row_loss.h"
#include "algorithms/sweep.h"

namespace miniquant::algorithms {

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
  at::Tensor gradient = options.refine > 0 ? room_for_gradient(values) : at::Tensor();
  at::Tensor row_loss = sweep_rows(values, factor, options, grid, importance, gradient);
  factor = {};
  const at::Tensor swept_loss = row_loss;
  if (options.refine > 0) {
    row_loss = row_loss.clone();
    refine(hessian, damping, options.refine, grid, gradient, row_loss);
  }
  const at::Tensor moved = round_dead_inputs(dead, values, grid);
  settle_row_loss(hessian, damping, values, grid, {.before = swept_loss, .moved = moved}, row_loss);
  const QuantizationGrid& kind = options;
  return {{kind, grid.codes, grid.stored_scales(), grid.zero_points}, in_true_units(row_loss, scaled, damping)};
}

}  // namespace miniquant::algorithms
