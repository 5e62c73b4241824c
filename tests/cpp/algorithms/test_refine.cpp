#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include "algorithms/damping.h"
#include "algorithms/gptq.h"
#include "algorithms/loss.h"
#include "algorithms/refine.h"
#include "algorithms/rtn.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

using testing::differences;

/// What the sweep and the descent leave for refine().
struct Begun {
  Grid grid;
  at::Tensor row_loss;
};

Begun begin(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options) {
  GptqOptions without = options;
  without.refine = 1;
  const GptqResult result = algorithms::gptq(weight, hessian, without);
  Grid grid = make_grid(weight, options);
  grid.codes = result.codes;
  grid.scales = result.scales.clone();
  grid.zero_points = result.zero_points;
  return {grid, result.row_loss.clone()};
}

class Refine : public ::testing::TestWithParam<bool> {
 protected:
  Refine() {
    options_.group_size = 16;
    options_.bits = 3;
    options_.ridge = 0.1;
    options_.symmetric = GetParam();
    options_.refine = 1 + kRounds;
  }

  static constexpr int64_t kRounds = 2;
  const at::Tensor weight_ = testing::normal({100, 40}, 1);
  const at::Tensor hessian_ = testing::hessian_of_inputs(40, 100, 2);
  GptqOptions options_;
};

TEST_P(Refine, LowersTheLossAndSaysWhatIsLeft) {
  Begun begun = begin(weight_, hessian_, options_);
  const Grid before = {.range = begun.grid.range,
                       .group_size = begun.grid.group_size,
                       .stored = begun.grid.stored,
                       .codes = begun.grid.codes.clone(),
                       .scales = begun.grid.scales.clone(),
                       .zero_points = begun.grid.zero_points.clone()};
  const at::Tensor loss_before = begun.row_loss.clone();
  refine(weight_, hessian_, options_.ridge, kRounds, begun.grid, begun.row_loss);
  EXPECT_TRUE(begun.row_loss.le(loss_before).all().item<bool>());
  EXPECT_LT(begun.row_loss.sum().item<double>(), 0.97 * loss_before.sum().item<double>());
  EXPECT_GT(differences(begun.grid.codes, before.codes), 0);
  EXPECT_GT(differences(begun.grid.scales, before.scales), 0);
  EXPECT_TRUE(at::equal(begun.grid.zero_points, before.zero_points));
  // Exact but for the rounding of sums of 40 * 40 products in float64.
  const at::Tensor values = dequantize(begun.grid.codes, begun.grid.scales, begun.grid.zero_points, 16);
  const at::Tensor loss = quantization_loss(weight_, values, damp(hessian_, options_.ridge, at::kDouble).matrix);
  EXPECT_LE((begun.row_loss / loss - 1).abs().max().item<double>(), 1e-12);
}

TEST_P(Refine, IsWhatFollowsTheDescent) {
  Begun begun = begin(weight_, hessian_, options_);
  refine(weight_, hessian_, options_.ridge, kRounds, begun.grid, begun.row_loss);
  const GptqResult result = algorithms::gptq(weight_, hessian_, options_);
  EXPECT_TRUE(at::equal(result.codes, begun.grid.codes));
  EXPECT_TRUE(at::equal(result.scales, begun.grid.scales));
  EXPECT_TRUE(at::equal(result.row_loss, begun.row_loss));
}

TEST_P(Refine, DoesNotDependOnTheNumberOfThreads) {
  Begun one = begin(weight_, hessian_, options_);
  Begun two = begin(weight_, hessian_, options_);
  {
    const testing::ScopedThreads threads(1);
    refine(weight_, hessian_, options_.ridge, kRounds, one.grid, one.row_loss);
  }
  const testing::ScopedThreads threads(2);
  refine(weight_, hessian_, options_.ridge, kRounds, two.grid, two.row_loss);
  EXPECT_TRUE(at::equal(one.grid.codes, two.grid.codes));
  EXPECT_TRUE(at::equal(one.grid.scales, two.grid.scales));
  EXPECT_TRUE(at::equal(one.row_loss, two.row_loss));
}

INSTANTIATE_TEST_SUITE_P(Grids, Refine, ::testing::Bool(),
                         [](const auto& grid) { return grid.param ? "Symmetric" : "Asymmetric"; });

}  // namespace
}  // namespace miniquant::algorithms
