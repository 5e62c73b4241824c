#include "algorithms/ridge.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

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

/// Layers of at least so many columns are judged one way round: so many columns and the tokens that they need average
/// what the other way round would, and it would take as long again.
constexpr int64_t kColumnsOfOneWay = 4096;

/// Quantizes with the Hessian of one half of the tokens and measures with that of the other, both ways round, or for
/// large layers the first way only. Only one of them is kept converted for measurements; a second one would take the
/// memory of another float32 Hessian.
class Halves {
 public:
  Halves(at::Tensor weight, at::Tensor first, at::Tensor second)
      : weight_(std::move(weight)),
        hessians_{std::move(first), std::move(second)},
        ways_(weight_.size(1) < kColumnsOfOneWay ? 2 : 1) {}

  /// The sum of the losses of GPTQ; infinity where a Hessian is not positive definite with this ridge.
  [[nodiscard]] double loss(const GptqOptions& options) {
    try {
      std::vector<QuantizedWeight> of_halves;
      of_halves.reserve(ways_);
      for (size_t half = 0; half < ways_; ++half) {
        of_halves.push_back(algorithms::gptq(weight_, hessians_.at(half), options));
      }
      return loss_of(of_halves);
    } catch (const c10::LinAlgError&) {
      return std::numeric_limits<double>::infinity();
    }
  }

  /// The same of rounding to nearest.
  [[nodiscard]] double loss_of_nearest(const GridOptions& grid) {
    return loss_of(std::vector<QuantizedWeight>(ways_, algorithms::rtn(weight_, grid)));
  }

 private:
  /// The loss of what was quantized with each half, measured with the other; the half that is converted goes first.
  [[nodiscard]] double loss_of(const std::vector<QuantizedWeight>& of_halves) {
    double loss = 0;
    for (const size_t measured : {converted_, 1 - converted_}) {
      if (const size_t half = 1 - measured; half < of_halves.size()) {
        loss += loss_with(measured, of_halves[half]);
      }
    }
    return loss;
  }

  [[nodiscard]] double loss_with(size_t half, const QuantizedWeight& quantized) {
    if (measure_ == nullptr || converted_ != half) {
      measure_.reset();
      measure_ = std::make_unique<LossMeasure>(hessians_.at(half));
      converted_ = half;
    }
    const at::Tensor values =
        algorithms::dequantize(quantized.codes, quantized.scales, quantized.zero_points, quantized.group_size);
    return (*measure_)(weight_, values).sum().item<double>();
  }

  at::Tensor weight_;
  std::array<at::Tensor, 2> hessians_;
  size_t ways_;
  std::unique_ptr<LossMeasure> measure_;  ///< with the Hessian of the half `converted_`
  size_t converted_ = 1;
};

}  // namespace

JudgedRidges judged_ridges(int64_t tokens, int64_t columns) {
  // With the last ridge H is in effect a multiple of the identity, so GPTQ rounds to nearest.
  constexpr double kRoundsToNearest = 1e6;
  const at::TensorOptions options = at::TensorOptions().dtype(at::kDouble);
  const double usual = usual_ridge(tokens);
  if (tokens / 2 < columns) {
    // If a half does not determine H, no ridge below the usual one is tried. Tokens of one text resemble one another,
    // so two small halves agree with each other better than with future tokens, and smaller ridges look better than
    // they are.
    return {at::tensor({usual, 3 * usual, 10 * usual, 30 * usual, 100 * usual, kRoundsToNearest}, options), 0};
  }
  return {at::tensor({usual / 10, usual / 3, usual, 3 * usual, 10 * usual, kRoundsToNearest}, options), 2};
}

at::Tensor judge_ridges(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second,
                        const JudgedRidges& judged, const GridOptions& grid) {
  Halves halves(some_rows(weight).to(compute_dtype(weight.scalar_type())), first, second);
  const double of_half_the_tokens = std::pow(2.0, kPowerOfTokens);
  at::Tensor losses = at::full({kJudgedRidges}, kNotTried, judged.ridges.options());
  auto* const loss = losses.mutable_data_ptr<double>();
  const auto judge = [&](int64_t i) {
    GptqOptions options{grid};
    options.ridge = judged.ridges.const_data_ptr<double>()[i] * of_half_the_tokens;
    loss[i] = halves.loss(options);
  };
  // The loss falls to one minimum and rises after it, but for noise far below what a ridge is worth.
  constexpr int64_t kNearest = kJudgedRidges - 1;
  loss[kNearest] = halves.loss_of_nearest(grid);
  judge(judged.usual);
  int64_t best = judged.usual;
  const auto walk = [&](int64_t step, int64_t end) {
    for (int64_t i = best + step; i != end; i += step) {
      judge(i);
      if (loss[i] >= loss[best] && std::isfinite(loss[best])) {
        return;
      }
      best = i;
    }
  };
  walk(1, kNearest);
  if (best == judged.usual) {
    walk(-1, -1);
  }
  return losses;
}

at::Tensor fallbacks_of(const at::Tensor& ridge) { return ridge * at::tensor({10.0, 100.0, 1000.0}, ridge.options()); }

}  // namespace miniquant::algorithms
