#pragma once

#include <ATen/core/Tensor.h>

namespace miniquant::algorithms {

/// hessian += X^T X. Arguments as miniquant::hessian_update_, already checked.
void hessian_update(at::Tensor& hessian, const at::Tensor& inputs);

}  // namespace miniquant::algorithms
