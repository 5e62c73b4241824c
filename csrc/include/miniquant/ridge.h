#pragma once

#include <miniquant/gptq.h>
#include <miniquant/hessian.h>

#include <vector>

namespace miniquant {

/// The ridge that the data ask for, and what was found on the way.
struct RidgeChoice {
  double ridge;                ///< relative to the Hessian's mean diagonal, as GptqOptions::ridge
  std::vector<double> ridges;  ///< those that were judged, ascending; with the last GPTQ rounds to nearest
  /// The held-out loss of each, relative to that of the last: below 1 where GPTQ is better than rounding to nearest.
  std::vector<double> held_out;
  std::vector<double> fallbacks;  ///< larger ridges, to try in turn where H is not positive definite with `ridge`
};

/// Judges ridges by the tokens themselves: some rows of the weight are quantized with the Hessian of one half of the
/// tokens and measured with that of the other, both ways round, and the ridge of least loss is taken. With fewer tokens
/// in a half than columns, ridges below (128 / tokens)^0.7 are not tried: see docs/algorithm.md, "The ridge from the
/// data". Where tokens have weights, the effective number of tokens takes the place of theirs.
///
/// accumulator: one that keeps its halves apart (Halves::kApart), with a token in either.
/// grid: its bits, group_size and symmetric are those of GPTQ as it is judged, on the plain grid; scales must not be
/// given.
/// Throws c10::ValueError / c10::TypeError on bad arguments. Costs twelve factorizations of H, and at most twelve
/// sweeps over 128 rows.
MINIQUANT_API RidgeChoice choose_ridge(const at::Tensor& weight, const HessianAccumulator& accumulator,
                                       const GridOptions& grid = {});

/// gptq() with a ridge from the data.
struct AutoGptqResult : GptqResult {
  RidgeChoice choice;
  double ridge;                ///< the one that was used: choice.ridge, or larger
  std::vector<double> failed;  ///< ridges, ascending, with which H was not positive definite
};

/// The call to start from: gptq() with the ridge that choose_ridge() finds for options.bits, group_size and symmetric;
/// options.ridge is not read. Where H is not positive definite with it, RidgeChoice::fallbacks are tried; the result says
/// which ridge was used. Throws c10::LinAlgError where none serves.
MINIQUANT_API AutoGptqResult gptq_auto(const at::Tensor& weight, const HessianAccumulator& accumulator,
                                       const GptqOptions& options = {});

}  // namespace miniquant
