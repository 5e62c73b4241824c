#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/bf16.h"
#include "miniquant/options.h"

// Sums of products of bfloat16 and float16 values, and at a lower precision Hessians of float32 inputs, with the
// kernels of kernels/bf16.h.

namespace miniquant::algorithms {

/// Whether `kernels` (may be null) add X^T diag(w) X to `hessian` faster than those for float32, with the accuracy that
/// `precision` asks for. Arguments as hessian_update(); `inputs` [n, K].
bool prefers_bf16(const kernels::Bf16Kernels* kernels, const at::Tensor& hessian, const at::Tensor& inputs,
                  const at::Tensor& token_weights, HessianPrecision precision);

/// hessian += X^T diag(w) X for inputs X [n, K], bfloat16, float16, or float32 (with HessianPrecision::kBf16x3), and a
/// contiguous float32 `hessian`.
void add_bf16_squares(const kernels::Bf16Kernels& kernels, at::Tensor& hessian, const at::Tensor& inputs,
                      const at::Tensor& token_weights);

/// Whether `kernels` (may be null) add X^T Y to `sum` faster than those for float32, and as exactly. Arguments as
/// product_update().
bool prefers_bf16(const kernels::Bf16Kernels* kernels, const at::Tensor& sum, const at::Tensor& left,
                  const at::Tensor& right);

/// sum += X^T Y for X [n, M] and Y [n, K], bfloat16 or float16, and a contiguous float32 `sum`.
void add_bf16_products(const kernels::Bf16Kernels& kernels, at::Tensor& sum, const at::Tensor& left,
                       const at::Tensor& right);

}  // namespace miniquant::algorithms
