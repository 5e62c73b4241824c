#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include "algorithms/damping.h"
#include "algorithms/grid.h"
#include "miniquant/options.h"

namespace miniquant::algorithms {

/// H = R R^T in the order of the sweep.
struct SweepFactor {
  at::Tensor column;         ///< int64 [K], the stored column of each step
  at::Tensor triangle;       ///< compute dtype, L = R^T as lower_triangle() lays it out
  at::Tensor pivot;          ///< compute dtype [K], R_jj
  at::Tensor pivot_squared;  ///< compute dtype [K], R_jj^2; 0 where the damped Hessian's diagonal is 0
};

/// Factors the damped Hessian in `dtype`, in float64 first where float32 is not accurate enough. Reads the order of
/// columns and the group size of `options`. Throws the c10::LinAlgError of `op` where D is not positive definite.
SweepFactor factor_for_sweep(const char* op, const at::Tensor& hessian, const Damping& damping,
                             const GptqOptions& options, at::ScalarType dtype);

/// Sets the codes of `grid`, its scales unless options.scales has a value and, if it is defined, the `gradient` for
/// refine(). weight: [N, K], ScaledWeight::values. importance: as ScalesOfRows reads it. Returns the loss of each row.
at::Tensor sweep_rows(const at::Tensor& weight, const SweepFactor& factor, const GptqOptions& options, const Grid& grid,
                      const at::Tensor& importance, const at::Tensor& gradient);

}  // namespace miniquant::algorithms
