#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "algorithms/damping.h"
#include "algorithms/grid.h"

namespace miniquant::algorithms {

/// Room for the gradient E H of a weight [N, K], including the padding columns that the kernels read.
at::Tensor room_for_gradient(const at::Tensor& weight);

/// Lowers the loss of a quantized weight in at most `rounds` rounds: the first moves single codes
/// (kernels/descent-inl.h), further rounds also fit scales (kernels/refine-inl.h).
///
/// hessian: as miniquant::gptq. grid: codes and scales change, zero points do not.
/// gradient: compute dtype, [N, kernels::SymmetricLayout::padded_columns()], E D with E = weight - dequantized and D
/// the damped Hessian of `damping`, 0 past the last column; overwritten. row_loss: [N], e D e^T, updated in place.
void refine(const at::Tensor& hessian, const Damping& damping, int64_t rounds, Grid& grid, at::Tensor& gradient,
            at::Tensor& row_loss);

}  // namespace miniquant::algorithms
