#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "algorithms/gptq.h"
#include "algorithms/loss.h"
#include "algorithms/ridge.h"
#include "algorithms/rtn.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

double loss_of(const QuantizedWeight& quantized, const at::Tensor& weight, const at::Tensor& hessian,
               int64_t group_size) {
  const at::Tensor values = dequantize(quantized.codes, quantized.scales, quantized.zero_points, group_size);
  return quantization_loss(weight, values, hessian).sum().item<double>();
}

TEST(JudgedRidges, AscendAroundTheUsualOne) {
  // (128 / tokens)^0.7: 1 at 128 tokens, a tenth at 128 * 10^(1 / 0.7).
  const JudgedRidges few = judged_ridges(128, 65);
  const JudgedRidges many = judged_ridges(128, 64);
  for (const JudgedRidges& judged : {few, many}) {
    ASSERT_EQ(judged.ridges.numel(), kJudgedRidges);
    EXPECT_TRUE(judged.ridges.diff().gt(0).all().item<bool>());
    EXPECT_EQ(judged.ridges[judged.usual].item<double>(), 1.0);
  }
  EXPECT_EQ(few.usual, 0);
  EXPECT_EQ(many.ridges[0].item<double>(), 0.1);
  EXPECT_NEAR(judged_ridges(3434, 64).ridges[2].item<double>(), 0.1, 1e-5);
}

/// The loss of ridges by hand: one half's codes measured with the other, both ways round.
std::vector<double> losses_by_hand(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second,
                                   const at::Tensor& ridges, const GridOptions& grid) {
  std::vector<double> losses;
  for (int64_t i = 0; i < kJudgedRidges; ++i) {
    GptqOptions options{grid};
    options.ridge = ridges[i].item<double>() * std::pow(2.0, 0.7);
    losses.push_back(loss_of(algorithms::gptq(weight, first, options), weight, second, grid.group_size) +
                     loss_of(algorithms::gptq(weight, second, options), weight, first, grid.group_size));
  }
  return losses;
}

TEST(JudgeRidges, MeasuresOneHalfsCodesWithTheOther) {
  const at::Tensor weight = testing::normal({9, 24}, 1);
  const at::Tensor first = testing::hessian_of_inputs(24, 50, 2);
  const at::Tensor second = testing::hessian_of_inputs(24, 50, 3);
  GridOptions grid;
  grid.group_size = 8;
  grid.bits = 3;
  const JudgedRidges judged = judged_ridges(100, 24);
  const at::Tensor losses = judge_ridges(weight, first, second, judged, grid);
  const std::vector<double> expected = losses_by_hand(weight, first, second, judged.ridges, grid);
  EXPECT_GE(losses.ne(kNotTried).sum().item<int64_t>(), 3);
  for (int64_t i = 0; i < kJudgedRidges; ++i) {
    if (losses[i].item<double>() != kNotTried) {
      EXPECT_DOUBLE_EQ(losses[i].item<double>(), expected[i]) << i;
    }
  }
  const QuantizedWeight nearest = algorithms::rtn(weight, grid);
  EXPECT_DOUBLE_EQ(losses[kJudgedRidges - 1].item<double>(),
                   loss_of(nearest, weight, first, 8) + loss_of(nearest, weight, second, 8));
}

TEST(JudgeRidges, TriesNeighborsOfTheUsualRidgeUntilTheLossRises) {
  const at::Tensor weight = testing::normal({40, 24}, 1);
  GridOptions grid;
  grid.group_size = 8;
  bool down = false;
  bool up = false;
  // 60 tokens that are taken for 48 to two million: the usual ridge is too large, about right, too small.
  for (const int64_t tokens : {48, 480, 4800, 2000000}) {
    const auto half = [&](uint64_t seed) {
      const at::Tensor inputs = testing::normal({60, 24}, seed).matmul(testing::normal({24, 24}, 5).cumsum(0));
      return inputs.t().matmul(inputs) / 60;
    };
    const at::Tensor first = half(2);
    const at::Tensor second = half(3);
    const JudgedRidges judged = judged_ridges(tokens, 24);
    const at::Tensor losses = judge_ridges(weight, first, second, judged, grid);
    const std::vector<double> all = losses_by_hand(weight, first, second, judged.ridges, grid);
    // By hand: which ridges are tried.
    std::vector<bool> tried(kJudgedRidges, false);
    tried[judged.usual] = tried[kJudgedRidges - 1] = true;
    int64_t i = judged.usual + 1;
    for (; i < kJudgedRidges - 1; ++i) {
      tried[i] = true;
      if (all[i] >= all[i - 1]) {
        break;
      }
    }
    up |= i > judged.usual + 1;
    for (int64_t j = judged.usual - 1; j >= 0 && i == judged.usual + 1; --j) {
      tried[j] = true;
      down |= all[j] < all[j + 1];
      if (all[j] >= all[j + 1]) {
        break;
      }
    }
    for (int64_t k = 0; k < kJudgedRidges; ++k) {
      const double loss = losses[k].item<double>();
      if (tried[k]) {
        EXPECT_DOUBLE_EQ(loss, all[k]) << tokens << " " << k;
      } else {
        EXPECT_EQ(loss, kNotTried) << tokens << " " << k;
      }
    }
  }
  EXPECT_TRUE(down && up);
}

TEST(JudgeRidges, LooksAtRowsFromAllOfTheWeight) {
  const at::Tensor hessian = testing::hessian_of_inputs(8, 50, 2);
  const JudgedRidges ridges = judged_ridges(100, 8);
  // Every second row of 256 is used, so the others may be anything.
  const at::Tensor weight = testing::normal({256, 8}, 1);
  const at::Tensor others = weight.clone();
  others.slice(0, 1, 256, 2).fill_(100);
  EXPECT_TRUE(at::equal(judge_ridges(weight, hessian, hessian, ridges, {}),
                        judge_ridges(others, hessian, hessian, ridges, {})));
  others.slice(0, 254, 255).fill_(100);
  EXPECT_FALSE(at::equal(judge_ridges(weight, hessian, hessian, ridges, {}),
                         judge_ridges(others, hessian, hessian, ridges, {})));
}

TEST(JudgeRidges, AFailureIsAnInfiniteLoss) {
  const at::Tensor weight = testing::normal({3, 8}, 1);
  const at::Tensor good = testing::hessian_of_inputs(8, 50, 2);
  const at::Tensor bad = -at::eye(8, at::kDouble);
  const at::Tensor losses = judge_ridges(weight, good, bad, judged_ridges(100, 8), {});
  // From the usual ridge on; none below it is tried then.
  EXPECT_TRUE(losses.slice(0, 2, kJudgedRidges - 1).isinf().all().item<bool>());
  EXPECT_TRUE((losses.slice(0, 0, 2) == kNotTried).all().item<bool>());
  EXPECT_TRUE(losses[kJudgedRidges - 1].isfinite().item<bool>()) << "rounding to nearest needs no factor";
}

TEST(JudgeRidges, LargeLayersAreJudgedOneWayRound) {
  for (const int64_t columns : {4095, 4096}) {
    // Without correlations GPTQ rounds to nearest, with whatever half.
    const at::Tensor weight = testing::normal({1, columns}, 1).to(at::kFloat);
    const at::Tensor first = at::eye(columns, at::kFloat);
    const at::Tensor second = 2 * first;
    const QuantizedWeight nearest = algorithms::rtn(weight, {});
    const double of_first = loss_of(nearest, weight, first, 64);
    const JudgedRidges ridges{judged_ridges(100, columns).ridges, kJudgedRidges - 2};  // few are tried
    const at::Tensor losses = judge_ridges(weight, first, second, ridges, {});
    for (const int64_t i : {ridges.usual, kJudgedRidges - 1}) {
      EXPECT_NEAR(losses[i].item<double>(), (columns < 4096 ? 3 : 2) * of_first, 1e-6 * of_first)
          << columns << " " << i;
    }
  }
}

}  // namespace
}  // namespace miniquant::algorithms
