#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "algorithms/grid.h"

namespace miniquant::algorithms {

/// Lowers the loss of a quantized weight by at most `rounds` rounds; see kernels/refine.inl.
///
/// weight: [N, K], compute dtype, contiguous. hessian: as miniquant::gptq, damped here by `ridge`.
/// grid: codes and scales are changed; zero points are not. row_loss: [N], e H e^T of the grid as it comes in; changed.
void refine(const at::Tensor& weight, const at::Tensor& hessian, double ridge, int64_t rounds, Grid& grid,
            at::Tensor& row_loss);

}  // namespace miniquant::algorithms
