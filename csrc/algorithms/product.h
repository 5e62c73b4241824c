#pragma once

#include <ATen/core/Tensor.h>

namespace miniquant::algorithms {

/// What multiplies: the kernels of this library, or ATen.
enum class Multiplier { kKernels, kAten };

/// The faster one: ATen where its products come from MKL on a CPU for which MKL has AVX-512 code, which is Intel's.
Multiplier fastest_multiplier();

/// sum += X^T Y of X [n, M] and Y [n, K], of any dtype and strides. sum: [M, K], float32 or float64, any strides. With
/// kKernels the order of the sums does not depend on the number of threads.
void product_update(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right,
                    Multiplier multiplier = fastest_multiplier());

}  // namespace miniquant::algorithms
