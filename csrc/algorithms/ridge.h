#pragma once

#include <ATen/core/Tensor.h>

#include "miniquant/options.h"

namespace miniquant::algorithms {

/// The ridges to judge for a Hessian [columns, columns] of `tokens` tokens, ascending: float64 [kJudgedRidges].
inline constexpr int64_t kJudgedRidges = 6;
at::Tensor judged_ridges(int64_t tokens, int64_t columns);

/// float64 [kJudgedRidges]: the held-out loss of each ridge. Some rows of the weight are quantized with the Hessian of
/// one half of the tokens and measured with that of the other; the losses of both ways round are added. Each ridge is
/// first raised to its equivalent for half the tokens. Infinity where a Hessian could not be factored. Arguments as
/// miniquant::choose_ridge, already checked.
at::Tensor judge_ridges(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second,
                        const at::Tensor& ridges, const GridOptions& grid);

/// What to try in turn where a Hessian is not positive definite with `ridge` (float64 []): float64 [kFallbacks].
inline constexpr int64_t kFallbacks = 3;
at::Tensor fallbacks_of(const at::Tensor& ridge);

}  // namespace miniquant::algorithms
