#pragma once

#include <ATen/core/Tensor.h>

namespace miniquant::algorithms {

/// e H e^T per row, float64 [N]. error: float64 [N, K], contiguous. triangle: H [K, K] in float64, as lower_triangle()
/// lays it out.
at::Tensor quadratic_forms(const at::Tensor& error, const at::Tensor& triangle);

/// e H e^T per row, float64 [N], with the precision of the weight's compute dtype and the range of float64. Arguments
/// as below.
at::Tensor wide_quantization_loss(const at::Tensor& weight, const at::Tensor& dequantized, const at::Tensor& hessian);

/// e H e^T per row. Arguments as miniquant::quantization_loss, already checked.
at::Tensor quantization_loss(const at::Tensor& weight, const at::Tensor& dequantized, const at::Tensor& hessian);

}  // namespace miniquant::algorithms
