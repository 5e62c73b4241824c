#pragma once

#include <ATen/core/Tensor.h>

#include "algorithms/grid.h"

namespace miniquant::algorithms {

/// Room for E H of a weight [N, K], as descend() takes it.
at::Tensor room_for_gradient(const at::Tensor& weight);

/// Lowers the loss of a quantized weight by moving codes until no move of a single one does; see kernels/descent.inl.
///
/// hessian: as miniquant::gptq, damped here by `ridge`. grid: codes are changed.
/// gradient: compute dtype, [N, kernels::SymmetricLayout::padded_columns()], E H with E = weight - dequantized and the
/// damped H; overwritten. row_loss: [N], e H e^T of the grid as it comes in; changed.
void descend(const at::Tensor& hessian, double ridge, Grid& grid, at::Tensor& gradient, at::Tensor& row_loss);

}  // namespace miniquant::algorithms
