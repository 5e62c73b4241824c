#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <cstdint>

#include "algorithms/damping.h"
#include "algorithms/gptq.h"
#include "algorithms/loss.h"
#include "algorithms/refine.h"
#include "algorithms/rtn.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

using testing::differences;

/// A weight rounded to nearest, with its gradient and loss.
struct Rounded {
  Grid grid;
  at::Tensor gradient;
  at::Tensor row_loss;
};

at::Tensor values_of(const Grid& grid) {
  return dequantize(grid.codes, grid.scales, grid.zero_points, grid.group_size);
}

class Refine : public ::testing::TestWithParam<bool> {
 protected:
  Refine() {
    options_.group_size = 16;
    options_.bits = 3;
    options_.symmetric = GetParam();
    options_.ridge = kRidge;
  }

  [[nodiscard]] Rounded rounded() const {
    const QuantizedWeight nearest = algorithms::rtn(weight_, options_);
    Rounded result{.grid = make_grid(weight_, options_), .gradient = room_for_gradient(weight_), .row_loss = {}};
    result.grid.codes = nearest.codes;
    result.grid.scales = nearest.scales.clone();
    result.grid.zero_points = nearest.zero_points;
    result.gradient.zero_();
    const at::Tensor seen = damped_ * damping_.factor;
    result.gradient.narrow(1, 0, weight_.size(1)).copy_((weight_ - values_of(result.grid)).matmul(seen));
    result.row_loss = quantization_loss(weight_, values_of(result.grid), seen);
    return result;
  }

  static constexpr double kRidge = 0.1;
  const at::Tensor weight_ = testing::normal({100, 70}, 1);
  const at::Tensor hessian_ = testing::hessian_of_inputs(70, 100, 2);
  const Damping damping_ = damping_of(hessian_, kRidge);
  const at::Tensor damped_ = testing::damped(hessian_, kRidge);
  GptqOptions options_;
};

TEST_P(Refine, EveryRoundLowersTheLossAndSaysWhatIsLeft) {
  at::Tensor loss_before = rounded().row_loss;
  at::Tensor codes_before = rounded().grid.codes.clone();
  for (const int64_t rounds : {1, 2, 3}) {
    Rounded rounded = this->rounded();
    const at::Tensor scales = rounded.grid.scales.clone();
    const at::Tensor zero_points = rounded.grid.zero_points.clone();
    refine(hessian_, damping_, rounds, rounded.grid, rounded.gradient, rounded.row_loss);
    EXPECT_TRUE(rounded.row_loss.le(loss_before).all().item<bool>()) << rounds;
    EXPECT_LT(rounded.row_loss.sum().item<double>(), loss_before.sum().item<double>()) << rounds;
    EXPECT_GT(differences(rounded.grid.codes, codes_before), 0) << rounds;
    // The first round moves codes only.
    EXPECT_EQ(differences(rounded.grid.scales, scales) > 0, rounds > 1) << rounds;
    EXPECT_TRUE(at::equal(rounded.grid.zero_points, zero_points)) << rounds;
    // Exact except for rounding in sums of 70 * 70 products in float64.
    const at::Tensor loss = quantization_loss(weight_, values_of(rounded.grid), damped_ * damping_.factor);
    EXPECT_LE((rounded.row_loss / loss - 1).abs().max().item<double>(), 1e-12) << rounds;
    loss_before = rounded.row_loss;
    codes_before = rounded.grid.codes;
  }
}

TEST_P(Refine, DoesNotDependOnTheNumberOfThreads) {
  Rounded one = rounded();
  Rounded two = rounded();
  {
    const testing::ScopedThreads threads(1);
    refine(hessian_, damping_, 3, one.grid, one.gradient, one.row_loss);
  }
  const testing::ScopedThreads threads(2);
  refine(hessian_, damping_, 3, two.grid, two.gradient, two.row_loss);
  EXPECT_TRUE(at::equal(one.grid.codes, two.grid.codes));
  EXPECT_TRUE(at::equal(one.grid.scales, two.grid.scales));
  EXPECT_TRUE(at::equal(one.row_loss, two.row_loss));
}

// In gptq, with the gradient of its sweep: at the end no move of a single code lowers a row's loss.
TEST_P(Refine, LeavesNoMoveToARowOfGptq) {
  options_.refine = 100;
  const GptqResult result = algorithms::gptq(weight_, hessian_, options_);
  const at::Tensor values = dequantize(result.codes, result.scales, result.zero_points, options_.group_size);
  const at::Tensor gradient = (weight_ - values).matmul(damped_);
  const at::Tensor scale = result.scales.repeat_interleave(options_.group_size, 1).narrow(1, 0, weight_.size(1));
  const kernels::CodeRange range = code_range(options_.bits, options_.symmetric, options_.full_range);
  for (const int step : {-1, 1}) {
    const at::Tensor move = scale * step;
    const at::Tensor change = move.square() * damped_.diagonal() - 2 * move * gradient;
    const at::Tensor moved = result.codes + step;
    const at::Tensor allowed = moved.ge(range.code_min).logical_and(moved.le(range.code_max));
    EXPECT_GE(change.masked_select(allowed).min().item<double>(), -1e-12);
  }
}

INSTANTIATE_TEST_SUITE_P(Grids, Refine, ::testing::Bool(),
                         [](const auto& grid) { return grid.param ? "Symmetric" : "Asymmetric"; });

}  // namespace
}  // namespace miniquant::algorithms
