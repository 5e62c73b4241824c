#pragma once

#include <miniquant/gptq.h>
#include <miniquant/hessian.h>

#include <vector>

namespace miniquant {

/// A ridge chosen from the data, and the figures it was chosen by.
struct RidgeChoice {
  double ridge;                ///< relative to the Hessian's mean diagonal, as GptqOptions::ridge
  std::vector<double> ridges;  ///< the ridges tried, ascending; the last stands for rounding to nearest
  /// The held-out loss of each, relative to that of the last: below 1 where GPTQ beats rounding to nearest. Infinite
  /// where the Hessian of a half is not positive definite.
  std::vector<double> held_out;
  std::vector<double> fallbacks;  ///< larger ridges, to try in turn where H is not positive definite with `ridge`
};

/// Chooses a ridge by its held-out loss: some rows of the weight are quantized with the Hessian of one half of the
/// tokens and measured with that of the other, both ways round for fewer than 4096 columns, and the ridge with
/// the least loss is taken. If a half has fewer tokens than the weight has columns, ridges below (128 / tokens)^0.7 are
/// not tried: see docs/algorithm.md, "The ridge from the data". If tokens have weights, the effective number of tokens
/// replaces their number.
///
/// accumulator: with Halves::kApart and at least one token in each half.
/// grid: only bits, group_size and symmetric are used, as the trials use the plain grid; given scales are rejected.
/// Throws c10::ValueError / c10::TypeError on bad arguments. Costs two to five factorizations of H for each way
/// round, and as many sweeps over at most 128 rows.
MINIQUANT_API RidgeChoice choose_ridge(const at::Tensor& weight, const HessianAccumulator& accumulator,
                                       const GridOptions& grid = {});

/// The result of gptq() with a ridge from the data.
struct AutoGptqResult : GptqResult {
  RidgeChoice choice;
  double ridge;                ///< the ridge used: choice.ridge, or larger
  std::vector<double> failed;  ///< the ridges, ascending, with which H was not positive definite
};

/// The call to start from: gptq() with the ridge that choose_ridge() finds for options.bits, group_size and symmetric;
/// options.ridge is not read. If H is not positive definite with that ridge, RidgeChoice::fallbacks are tried in turn;
/// `failed` lists the ridges that did not work. Throws c10::LinAlgError if none works.
MINIQUANT_API AutoGptqResult gptq_auto(const at::Tensor& weight, const HessianAccumulator& accumulator,
                                       const GptqOptions& options = {});

}  // namespace miniquant
