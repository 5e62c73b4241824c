#pragma once

#include <ATen/core/Tensor.h>

namespace miniquant::algorithms {

/// Whether no element is infinite or NaN. tensor: float32, float64, bfloat16 or float16, any shape, strides and device.
bool all_finite(const at::Tensor& tensor);

/// max |tensor|, 0 for an empty one; infinite or NaN if an element is not finite. In parallel for the dtypes of weights
/// and inputs.
double largest_magnitude(const at::Tensor& tensor);

}  // namespace miniquant::algorithms
