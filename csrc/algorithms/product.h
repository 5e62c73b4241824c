#pragma once

#include <ATen/core/Tensor.h>

namespace miniquant::algorithms {

/// What multiplies: the kernels of this library, those for 16 bits (kernels/bf16.h), or ATen.
enum class Multiplier { kKernels, kBf16, kAten };

/// The fastest that is as exact as the dtype of `sum`. Arguments as product_update(). ATen where its products come from
/// MKL and the vectors of MKL's code for this CPU are as long as those of the kernels.
Multiplier fastest_multiplier(const at::Tensor& sum, const at::Tensor& left, const at::Tensor& right);

/// sum += X^T Y of X [n, M] and Y [n, K], of any dtype and strides. sum: [M, K], float32 or float64, any strides. kBf16
/// is for float32 sums of values of 16 bits where bf16_kernels() is not null. But with kAten the order of the sums does
/// not depend on the number of threads.
void product_update(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right, Multiplier multiplier);

/// With the fastest one.
void product_update(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right);

}  // namespace miniquant::algorithms
