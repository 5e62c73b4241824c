#pragma once

#include <ATen/core/Tensor.h>

namespace miniquant::algorithms {

/// values_i * 2^exponents_i, each rounded once to the dtype of `values`, which stays on its device.
/// values: floating. exponents: int64, of the same number of elements.
at::Tensor times_power_of_two(const at::Tensor& values, const at::Tensor& exponents);

/// The same with one exponent.
at::Tensor times_power_of_two(const at::Tensor& values, int64_t exponent);

}  // namespace miniquant::algorithms
