#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <gtest/gtest.h>

#include <cmath>

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
  const at::Tensor few = judged_ridges(128, 65);
  const at::Tensor many = judged_ridges(128, 64);
  for (const at::Tensor& ridges : {few, many}) {
    ASSERT_EQ(ridges.numel(), kJudgedRidges);
    EXPECT_TRUE(ridges.diff().gt(0).all().item<bool>());
  }
  EXPECT_EQ(few[0].item<double>(), 1.0);
  EXPECT_EQ(many[0].item<double>(), 0.1);
  EXPECT_EQ(many[2].item<double>(), 1.0);
  EXPECT_NEAR(judged_ridges(3434, 64)[2].item<double>(), 0.1, 1e-5);
}

TEST(JudgeRidges, MeasuresOneHalfsCodesWithTheOther) {
  const at::Tensor weight = testing::normal({9, 24}, 1);
  const at::Tensor first = testing::hessian_of_inputs(24, 50, 2);
  const at::Tensor second = testing::hessian_of_inputs(24, 50, 3);
  GridOptions grid;
  grid.group_size = 8;
  grid.bits = 3;
  const at::Tensor ridges = judged_ridges(100, 24);
  const at::Tensor losses = judge_ridges(weight, first, second, ridges, grid);
  for (int64_t i = 0; i < kJudgedRidges; ++i) {
    GptqOptions options{grid};
    options.ridge = ridges[i].item<double>() * std::pow(2.0, 0.7);
    const double expected = loss_of(algorithms::gptq(weight, first, options), weight, second, 8) +
                            loss_of(algorithms::gptq(weight, second, options), weight, first, 8);
    EXPECT_DOUBLE_EQ(losses[i].item<double>(), expected) << i;
  }
  const QuantizedWeight nearest = algorithms::rtn(weight, grid);
  EXPECT_DOUBLE_EQ(losses[kJudgedRidges - 1].item<double>(),
                   loss_of(nearest, weight, first, 8) + loss_of(nearest, weight, second, 8));
}

TEST(JudgeRidges, LooksAtRowsFromAllOfTheWeight) {
  const at::Tensor hessian = testing::hessian_of_inputs(8, 50, 2);
  const at::Tensor ridges = judged_ridges(100, 8);
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
  EXPECT_TRUE(judge_ridges(weight, good, bad, judged_ridges(100, 8), {}).isinf().all().item<bool>());
}

}  // namespace
}  // namespace miniquant::algorithms
