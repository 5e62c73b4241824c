#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>
#include <miniquant/miniquant.h>

#include <algorithm>

#include "tensor_testing.h"

namespace miniquant {
namespace {

using testing::message_of;

HessianAccumulator accumulate(const at::Tensor& inputs) {
  HessianAccumulator accumulator(inputs.size(1), at::kDouble, Halves::kApart);
  accumulator.update(inputs);
  return accumulator;
}

TEST(Ridge, TheChoiceIsWhatWasJudgedBest) {
  const at::Tensor weight = testing::normal({150, 64}, 1);
  const HessianAccumulator accumulator = accumulate(testing::normal({40, 64}, 2));
  const RidgeChoice choice = choose_ridge(weight, accumulator);
  ASSERT_EQ(choice.ridges.size(), choice.held_out.size());
  EXPECT_EQ(choice.held_out.back(), 1.0);
  const auto least = std::ranges::min_element(choice.held_out);
  EXPECT_EQ(choice.ridge, choice.ridges[least - choice.held_out.begin()]);
  // White inputs, fewer than the weight's columns: they say nothing about other inputs.
  EXPECT_GT(choice.ridge, 10);
  EXPECT_EQ(choice.fallbacks, (std::vector<double>{10 * choice.ridge, 100 * choice.ridge, 1000 * choice.ridge}));
}

TEST(Ridge, AutomaticGptqReportsTheRidgeItUses) {
  const at::Tensor weight = testing::normal({20, 64}, 1);
  const HessianAccumulator accumulator = accumulate(testing::normal({500, 64}, 2).cumsum(1));
  GptqOptions options = options_of(Preset::kBest);
  options.group_size = 16;
  const AutoGptqResult automatic = gptq_auto(weight, accumulator, options);
  EXPECT_TRUE(automatic.failed.empty());
  EXPECT_EQ(automatic.ridge, automatic.choice.ridge);
  options.ridge = automatic.ridge;
  EXPECT_TRUE(at::equal(gptq(weight, accumulator.hessian(), options).codes, automatic.codes));
}

TEST(Ridge, AutomaticGptqTakesGivenScales) {
  const at::Tensor weight = testing::normal({20, 64}, 1);
  const HessianAccumulator accumulator = accumulate(testing::normal({500, 64}, 2).cumsum(1));
  GptqOptions options;
  options.scales = at::full({20, 1}, 0.5, at::kDouble);
  const AutoGptqResult automatic = gptq_auto(weight, accumulator, options);
  EXPECT_TRUE(at::equal(automatic.scales, *options.scales));
  EXPECT_EQ(automatic.choice.ridge, choose_ridge(weight, accumulator).ridge);
}

TEST(Ridge, ScalesAreRefused) {
  const at::Tensor weight = testing::normal({2, 64}, 1);
  GridOptions grid;
  grid.scales = at::ones({2, 1}, at::kDouble);
  EXPECT_EQ(message_of<c10::ValueError>(
                [&] { return choose_ridge(weight, accumulate(testing::normal({4, 64}, 2)), grid).ridge; }),
            "choose_ridge: expected no scales, but got scales of shape [2, 1]");
}

}  // namespace
}  // namespace miniquant
