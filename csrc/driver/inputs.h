#pragma once

#include <c10/core/ScalarType.h>

#include "driver/options.h"
#include "driver/problem.h"

namespace miniquant::driver {

/// The dtype in which a weight of that dtype is computed: float64 for float64, otherwise float32.
[[nodiscard]] at::ScalarType compute_type(at::ScalarType weight);

/// Throws InputError if the inputs and the ridge allow no result, after one pass over the inputs that is cheap beside
/// their Hessian:
/// - a sum of squares over tokens, of calibration or of fresh inputs, overflows the compute dtype, or all sums
/// underflow;
/// - the ridge makes the diagonal of the Hessian overflow the compute dtype;
/// - the ridge is to come from the data, but there are fewer than two tokens, or all inputs are 0.
/// - a ridge from the data is asked for, but there are fewer than two tokens, or all inputs are 0.
void check_inputs(const Problem& problem, const Options& options);

}  // namespace miniquant::driver
