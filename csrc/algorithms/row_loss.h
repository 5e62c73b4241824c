#pragma once

#include <ATen/core/Tensor.h>

#include "algorithms/damping.h"
#include "algorithms/grid.h"

// What is put right after the kernels ran: columns without inputs, and losses that were summed up while they changed.

namespace miniquant::algorithms {

/// Rounds the columns `dead` (int64 [D]) of `weight` [N, K] (compute dtype) to nearest on the final scales of `grid`.
/// No error of theirs reaches another column. Returns bool [N]: rows with a code that changed.
at::Tensor round_dead_inputs(const at::Tensor& dead, const at::Tensor& weight, Grid& grid);

/// The loss of each row at an earlier time, and rows whose codes changed since the loss was summed.
struct LossHistory {
  at::Tensor before;  ///< [N]
  at::Tensor moved;   ///< bool [N]
};

/// Computes anew, in float64, each row loss e D e^T of `row_loss` [N] that sums and differences may have lost: of rows
/// that moved, that are negative, or that fell to a small fraction of what they were. Never rises above `before`.
void settle_row_loss(const at::Tensor& hessian, const Damping& damping, const at::Tensor& weight, const Grid& grid,
                     const LossHistory& history, at::Tensor& row_loss);

/// A row loss [N] of a weight in the units of `weight` and of the Hessian in those of `damping`, as it is: rounded once
/// to its dtype, so one that is too small becomes 0 and one that is too large infinite.
at::Tensor in_true_units(const at::Tensor& row_loss, const ScaledWeight& weight, const Damping& damping);

}  // namespace miniquant::algorithms
