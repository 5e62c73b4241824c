#pragma once

#include <ATen/core/Tensor.h>

#include "miniquant/options.h"

namespace miniquant::algorithms {

/// hessian += X^T diag(w) X of inputs X [n, K] or [..., K]. Arguments as miniquant::hessian_update_, already checked.
/// token_weights: w, float64 [n], positive; undefined where all are 1.
void hessian_update(at::Tensor& hessian, const at::Tensor& inputs, const at::Tensor& token_weights = {},
                    HessianPrecision precision = HessianPrecision::kFull);

/// Adds tokens X [n, K] of weights w (as above) to the one sum or, where halves are kept apart, to either half by the
/// rule of miniquant::Halves::kApart.
void accumulate(const HessianSums& state, const at::Tensor& inputs, const at::Tensor& token_weights,
                HessianPrecision precision);

}  // namespace miniquant::algorithms
