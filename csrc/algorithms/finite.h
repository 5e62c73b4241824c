#pragma once

#include <ATen/core/Tensor.h>

namespace miniquant::algorithms {

/// Whether no element is infinite or NaN. tensor: float32, float64, bfloat16 or float16, any shape, strides and device.
bool all_finite(const at::Tensor& tensor);

}  // namespace miniquant::algorithms
