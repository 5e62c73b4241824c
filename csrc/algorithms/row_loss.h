#pragma once

#include <ATen/core/Tensor.h>

#include "algorithms/damping.h"
#include "algorithms/grid.h"

// Corrections after the kernels: columns of dead inputs, and losses that were added up while the codes changed.

namespace miniquant::algorithms {

/// Rounds the columns `dead` (int64 [D]) of `weight` [N, K] (compute dtype) to nearest on the final scales of `grid`.
/// Their errors reach no other column. Returns bool [N]: rows with a code that changed.
at::Tensor round_dead_inputs(const at::Tensor& dead, const at::Tensor& weight, Grid& grid);

/// The loss of each row at an earlier time, and the rows whose codes changed since the loss was computed.
struct LossHistory {
  at::Tensor before;  ///< [N]
  at::Tensor moved;   ///< bool [N]
};

/// Recomputes in float64 the entries e D e^T of `row_loss` [N] whose digits may be lost to rounding: rows that moved,
/// losses that are negative, and losses that fell to a small fraction of their value before. No loss exceeds `before`.
void settle_row_loss(const at::Tensor& hessian, const Damping& damping, const at::Tensor& weight, const Grid& grid,
                     const LossHistory& history, at::Tensor& row_loss);

/// A row loss [N], in the units of `weight` and `damping`, converted to those of the caller's weight and Hessian.
/// Rounded once to its dtype: a value too small becomes 0, one too large becomes infinite.
at::Tensor in_true_units(const at::Tensor& row_loss, const ScaledWeight& weight, const Damping& damping);

}  // namespace miniquant::algorithms
