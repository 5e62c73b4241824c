#include "algorithms/loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>

#include <cstdint>

#include "algorithms/dispatch.h"
#include "algorithms/grid.h"
#include "algorithms/packed_triangle.h"
#include "kernels/strip_layout.h"

namespace miniquant::algorithms {

at::Tensor quantization_loss(const at::Tensor& weight, const at::Tensor& dequantized, const at::Tensor& hessian) {
  const int64_t rows = weight.size(0);
  const int64_t columns = weight.size(1);
  const at::Tensor error = (weight.to(at::kDouble) - dequantized.to(at::kDouble)).contiguous();
  const at::Tensor h = hessian.to(at::kDouble).contiguous();
  const kernels::StripLayout layout = kernels::make_strip_layout(columns, /*segment_columns=*/columns + 1, 1);
  const at::Tensor packed = at::empty({layout.packed_size}, h.options());
  const at::Tensor form = at::empty({rows}, h.options());

  const double* const entries = h.const_data_ptr<double>();
  pack_triangle(layout, packed.mutable_data_ptr<double>(), [&](int64_t i, int64_t j) {
    return i == j ? entries[i * columns + i] : (entries[i * columns + j] + entries[j * columns + i]) / 2;
  });
  const kernels::QuadraticFormProblem<double> problem{.columns = columns,
                                                      .error = error.const_data_ptr<double>(),
                                                      .packed = packed.const_data_ptr<double>(),
                                                      .strip_begin = layout.strip_begin.data(),
                                                      .strip_offset = layout.strip_offset.data(),
                                                      .strips = layout.strips(),
                                                      .form = form.mutable_data_ptr<double>()};
  const auto& kernel = typed_kernels<double>();
  for_row_panels(rows, [&](int64_t row_begin, int64_t row_end) {
    const at::Tensor workspace = at::empty({kernel.quadratic_form_workspace(problem)}, h.options());
    kernel.quadratic_form(problem, row_begin, row_end, workspace.mutable_data_ptr<double>());
  });
  return form.to(compute_dtype(weight.scalar_type()));
}

}  // namespace miniquant::algorithms
