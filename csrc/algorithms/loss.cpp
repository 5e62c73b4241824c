#include "algorithms/loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>

#include <cstdint>

#include "algorithms/dispatch.h"
#include "algorithms/grid.h"
#include "algorithms/symmetric.h"

namespace miniquant::algorithms {

at::Tensor quantization_loss(const at::Tensor& weight, const at::Tensor& dequantized, const at::Tensor& hessian) {
  const int64_t rows = weight.size(0);
  const int64_t columns = weight.size(1);
  const at::Tensor error = (weight.to(at::kDouble) - dequantized.to(at::kDouble)).contiguous();
  const at::Tensor triangle = lower_triangle(hessian, at::kDouble);
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
  return form.to(compute_dtype(weight.scalar_type()));
}

}  // namespace miniquant::algorithms
