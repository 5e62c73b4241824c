#pragma once

#include <ATen/core/Tensor.h>

namespace miniquant::algorithms {

/// e H e^T per row. Arguments as miniquant::quantization_loss, already checked.
at::Tensor quantization_loss(const at::Tensor& weight, const at::Tensor& dequantized, const at::Tensor& hessian);

}  // namespace miniquant::algorithms
