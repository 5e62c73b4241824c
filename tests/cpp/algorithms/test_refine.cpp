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

/// What the sweep leaves for refine().
struct Swept {
  Grid grid;
  at::Tensor row_loss;
};

Swept sweep(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options) {
  GptqOptions without = options;
  without.refine = 0;
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
    options_.refine = 2;
  }

  const at::Tensor weight_ = testing::normal({19, 40}, 1);
  const at::Tensor hessian_ = testing::hessian_of_inputs(40, 100, 2);
  GptqOptions options_;
};

TEST_P(Refine, LowersTheLossAndSaysWhatIsLeft) {
  Swept swept = sweep(weight_, hessian_, options_);
  const Grid before = {.range = swept.grid.range,
                       .group_size = swept.grid.group_size,
                       .stored = swept.grid.stored,
                       .codes = swept.grid.codes.clone(),
                       .scales = swept.grid.scales.clone(),
                       .zero_points = swept.grid.zero_points.clone()};
  const at::Tensor loss_before = swept.row_loss.clone();
  refine(weight_, hessian_, options_, swept.grid, swept.row_loss);
  EXPECT_TRUE(swept.row_loss.le(loss_before).all().item<bool>());
  EXPECT_LT(swept.row_loss.sum().item<double>(), 0.97 * loss_before.sum().item<double>());
  EXPECT_GT(differences(swept.grid.codes, before.codes), 0);
  EXPECT_GT(differences(swept.grid.scales, before.scales), 0);
  EXPECT_TRUE(at::equal(swept.grid.zero_points, before.zero_points));
  // Exact but for the rounding of sums of 40 * 40 products in float64.
  const at::Tensor values = dequantize(swept.grid.codes, swept.grid.scales, swept.grid.zero_points, 16);
  const at::Tensor loss = quantization_loss(weight_, values, damp(hessian_, options_.ridge, at::kDouble).matrix);
  EXPECT_LE((swept.row_loss / loss - 1).abs().max().item<double>(), 1e-12);
}

TEST_P(Refine, IsWhatFollowsTheSweep) {
  Swept swept = sweep(weight_, hessian_, options_);
  refine(weight_, hessian_, options_, swept.grid, swept.row_loss);
  const GptqResult result = algorithms::gptq(weight_, hessian_, options_);
  EXPECT_TRUE(at::equal(result.codes, swept.grid.codes));
  EXPECT_TRUE(at::equal(result.scales, swept.grid.scales));
  EXPECT_TRUE(at::equal(result.row_loss, swept.row_loss));
}

TEST_P(Refine, DoesNotDependOnTheNumberOfThreads) {
  Swept one = sweep(weight_, hessian_, options_);
  Swept two = sweep(weight_, hessian_, options_);
  {
    const testing::ScopedThreads threads(1);
    refine(weight_, hessian_, options_, one.grid, one.row_loss);
  }
  const testing::ScopedThreads threads(2);
  refine(weight_, hessian_, options_, two.grid, two.row_loss);
  EXPECT_TRUE(at::equal(one.grid.codes, two.grid.codes));
  EXPECT_TRUE(at::equal(one.grid.scales, two.grid.scales));
  EXPECT_TRUE(at::equal(one.row_loss, two.row_loss));
}

INSTANTIATE_TEST_SUITE_P(Grids, Refine, ::testing::Bool(),
                         [](const auto& grid) { return grid.param ? "Symmetric" : "Asymmetric"; });

}  // namespace
}  // namespace miniquant::algorithms
