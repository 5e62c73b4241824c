#include "algorithms/loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <optional>

#include "algorithms/damping.h"
#include "algorithms/dispatch.h"
#include "algorithms/grid.h"
#include "algorithms/row_loss.h"
#include "algorithms/symmetric.h"

namespace miniquant::algorithms {

at::Tensor quadratic_forms(const at::Tensor& error, const at::Tensor& triangle) {
  const int64_t rows = error.size(0);
  const int64_t columns = error.size(1);
  const at::Tensor form = at::empty({rows}, error.options());
  const kernels::QuadraticFormProblem<double> problem{.triangle_layout = {columns},
                                                      .error = error.const_data_ptr<double>(),
                                                      .triangle = triangle.const_data_ptr<double>(),
                                                      .form = form.mutable_data_ptr<double>()};
  const auto& kernel = typed_kernels<double>();
  for_row_tiles(rows, kernel.tile_rows, columns * columns / 2, [&](int64_t row_begin, int64_t row_end) {
    const at::Tensor workspace = at::empty({kernel.quadratic_form_workspace(problem)}, error.options());
    kernel.quadratic_form(problem, row_begin, row_end, workspace.mutable_data_ptr<double>());
  });
  return form;
}

LossMeasure::LossMeasure(const at::Tensor& hessian)
    : damping_(damping_of(hessian, 0.0)), triangle_(lower_triangle(hessian, damping_.factor, at::kDouble)) {}

at::Tensor LossMeasure::operator()(const at::Tensor& weight, const at::Tensor& dequantized) const {
  const ScaledWeight error = scaled_weight(weight.to(at::kDouble) - dequantized.to(at::kDouble), std::nullopt);
  const at::Tensor form = quadratic_forms(error.values, triangle_);
  return in_true_units(form.to(compute_dtype(weight.scalar_type())).to(at::kDouble), error, damping_);
}

at::Tensor quantization_loss(const at::Tensor& weight, const at::Tensor& dequantized, const at::Tensor& hessian) {
  return LossMeasure(hessian)(weight, dequantized).to(compute_dtype(weight.scalar_type()));
}

}  // namespace miniquant::algorithms
