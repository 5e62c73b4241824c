#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "miniquant/options.h"

namespace miniquant::algorithms {

inline constexpr int64_t kJudgedRidges = 6;
/// Stands for the loss of a ridge that was not tried. (NaN would not be equal to itself where results are compared.)
inline constexpr double kNotTried = -1;

/// The ridges from which one is chosen.
struct JudgedRidges {
  at::Tensor ridges;  ///< float64 [kJudgedRidges], ascending; the last stands for rounding to nearest
  int64_t usual;      ///< the index of the one that is best for most layers
};

/// For a Hessian [columns, columns] of `tokens` tokens.
JudgedRidges judged_ridges(int64_t tokens, int64_t columns);

/// float64 [kJudgedRidges]: the held-out loss of each ridge. Some rows of the weight are quantized with the Hessian of
/// one half of the tokens and measured with that of the other; the losses of both ways round are added, but for weights
/// of 4096 columns or more, which are judged one way round. Each ridge is first raised to its equivalent for half the
/// tokens. From the usual ridge upward, or if that is no better downward, ridges are tried until the loss no longer
/// falls, and the last one always. kNotTried for the others, infinity where a Hessian could not be factored. Arguments
/// as miniquant::choose_ridge, already checked.
at::Tensor judge_ridges(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second,
                        const JudgedRidges& judged, const GridOptions& grid);

/// What to try in turn where a Hessian is not positive definite with `ridge` (float64 []): float64 [kFallbacks].
inline constexpr int64_t kFallbacks = 3;
at::Tensor fallbacks_of(const at::Tensor& ridge);

}  // namespace miniquant::algorithms
