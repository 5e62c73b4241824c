#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "algorithms/damping.h"
#include "algorithms/grid.h"

namespace miniquant::algorithms {

/// Room for the gradient E H of a weight [N, K], with the columns that the kernels read past the last.
at::Tensor room_for_gradient(const at::Tensor& weight);

/// Lowers the loss of a quantized weight by at most `rounds` rounds: the first moves single codes
/// (kernels/descent-inl.h), further ones fit scales as well (kernels/refine-inl.h).
///
/// hessian: as miniquant::gptq. grid: codes and scales are changed, zero points are not.
/// gradient: compute dtype, [N, kernels::SymmetricLayout::padded_columns()], E D with E = weight - dequantized and D
/// the damped Hessian of `damping`, 0 past the last column; overwritten. row_loss: [N], e D e^T of the grid as it comes
/// in; changed.
void refine(const at::Tensor& hessian, const Damping& damping, int64_t rounds, Grid& grid, at::Tensor& gradient,
            at::Tensor& row_loss);

}  // namespace miniquant::algorithms
