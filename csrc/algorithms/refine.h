#pragma once

#include <ATen/core/Tensor.h>

#include "algorithms/grid.h"
#include "miniquant/gptq.h"

namespace miniquant::algorithms {

/// Lowers the loss of a quantized weight by at most options.refine rounds; see kernels/refine.inl.
///
/// weight: [N, K], compute dtype, contiguous. hessian: as miniquant::gptq, damped here by options.ridge.
/// grid: codes and scales are changed; zero points are not. row_loss: [N], e H e^T of the grid as it comes in; changed.
void refine(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options, Grid& grid,
            at::Tensor& row_loss);

}  // namespace miniquant::algorithms
