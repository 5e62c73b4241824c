#include "algorithms/ridge.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "algorithms/gptq.h"
#include "algorithms/grid.h"
#include "algorithms/loss.h"
#include "algorithms/rtn.h"

namespace miniquant::algorithms {
namespace {

/// Max rows to judge by. All rows have the same inputs, so some represent the others.
constexpr int64_t kJudgedRows = 128;

/// Evenly spaced rows of the weight, at most kJudgedRows.
at::Tensor some_rows(const at::Tensor& weight) {
  const int64_t rows = weight.size(0);
  const int64_t judged = std::min(rows, kJudgedRows);
  return weight.index_select(0, at::arange(judged, at::kLong).mul(rows).div(std::max<int64_t>(judged, 1), "floor"));
}

/// The best ridge falls with the number of tokens to this power.
constexpr double kPowerOfTokens = 0.7;

/// A ridge to start from: the best one for the layers of an encoder (docs/algorithm.md, "The ridge from the data").
double usual_ridge(int64_t tokens) { return std::pow(128.0 / static_cast<double>(tokens), kPowerOfTokens); }

double held_out_loss(const at::Tensor& weight, const at::Tensor& calibration, const at::Tensor& held_out,
                     const GptqOptions& options) {
  try {
    const GptqResult result = algorithms::gptq(weight, calibration, options);
    const at::Tensor values =
        algorithms::dequantize(result.codes, result.scales, result.zero_points, options.group_size);
    return wide_quantization_loss(weight, values, held_out).sum().item<double>();
  } catch (const c10::LinAlgError&) {
    return std::numeric_limits<double>::infinity();
  }
}

}  // namespace

at::Tensor judged_ridges(int64_t tokens, int64_t columns) {
  // With the last ridge H is in effect a multiple of the identity, so GPTQ rounds to nearest.
  constexpr double kRoundsToNearest = 1e6;
  const at::TensorOptions options = at::TensorOptions().dtype(at::kDouble);
  const double usual = usual_ridge(tokens);
  if (tokens / 2 < columns) {
    // If a half does not determine H, no ridge below the usual one is tried. Tokens of one text resemble one another,
    // so two small halves agree with each other better than with future tokens, and smaller ridges look better than
    // they are.
    return at::tensor({usual, 3 * usual, 10 * usual, 30 * usual, 100 * usual, kRoundsToNearest}, options);
  }
  return at::tensor({usual / 10, usual / 3, usual, 3 * usual, 10 * usual, kRoundsToNearest}, options);
}

at::Tensor judge_ridges(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second,
                        const at::Tensor& ridges, const GridOptions& grid) {
  const at::Tensor rows = some_rows(weight).to(compute_dtype(weight.scalar_type()));
  at::Tensor losses = at::empty({kJudgedRidges}, ridges.options());
  GptqOptions options{grid};
  const double of_half_the_tokens = std::pow(2.0, kPowerOfTokens);
  for (int64_t i = 0; i < kJudgedRidges; ++i) {
    options.ridge = ridges.const_data_ptr<double>()[i] * of_half_the_tokens;
    losses.mutable_data_ptr<double>()[i] =
        held_out_loss(rows, first, second, options) + held_out_loss(rows, second, first, options);
  }
  return losses;
}

at::Tensor fallbacks_of(const at::Tensor& ridge) { return ridge * at::tensor({10.0, 100.0, 1000.0}, ridge.options()); }

}  // namespace miniquant::algorithms
