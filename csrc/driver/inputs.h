#pragma once

#include <c10/core/ScalarType.h>

#include "driver/options.h"
#include "driver/problem.h"

namespace miniquant::driver {

/// What a weight of that dtype is computed in: float64 for float64, else float32.
[[nodiscard]] at::ScalarType compute_type(at::ScalarType weight);

/// Throws InputError where no result can come of the inputs and the ridge, in a pass over the inputs that costs little
/// beside their Hessian:
/// - a sum of squares over tokens, of calibration or of fresh inputs, is beyond the range of the dtype that is computed
///   in, or all of them are so small that it holds none;
/// - the ridge makes of the Hessian's diagonal more than the dtype holds;
/// - a ridge from the data is asked for, but there are fewer than two tokens, or all inputs are 0.
void check_inputs(const Problem& problem, const Options& options);

}  // namespace miniquant::driver
