#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
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

TEST(Ridge, HalvesAreSumsOfTheirOwn) {
  const at::Tensor inputs = testing::normal({21, 7}, 1);
  HessianAccumulator accumulator(7, at::kDouble, Halves::kApart);
  accumulator.update(inputs.narrow(0, 0, 10));  // cut 5 + 5
  accumulator.update(inputs.narrow(0, 10, 3));  // to the first half
  accumulator.update(inputs.narrow(0, 13, 4));  // to the second
  accumulator.update(inputs.narrow(0, 17, 4));  // to the first
  EXPECT_EQ(accumulator.tokens(), 21);
  EXPECT_EQ(accumulator.half_tokens(0), 12);
  EXPECT_EQ(accumulator.half_tokens(1), 9);
  const at::Tensor first = at::cat({inputs.narrow(0, 0, 5), inputs.narrow(0, 10, 3), inputs.narrow(0, 17, 4)});
  const at::Tensor second = at::cat({inputs.narrow(0, 5, 5), inputs.narrow(0, 13, 4)});
  EXPECT_TRUE(at::allclose(accumulator.half(0), first.mT().matmul(first) / 12));
  EXPECT_TRUE(at::allclose(accumulator.half(1), second.mT().matmul(second) / 9));
  EXPECT_TRUE(at::allclose(accumulator.hessian(), inputs.mT().matmul(inputs) / 21));
}

// The batches and halves of the test of that name in tests/python/test_ridge.py: both accumulators split alike.
TEST(Ridge, LaterBatchesStayWholeAndGoWhereFewerTokensAre) {
  const at::Tensor inputs = testing::normal({61, 7}, 1);
  HessianAccumulator accumulator(7, at::kDouble, Halves::kApart);
  int64_t start = 0;
  for (const int64_t batch : {10, 4, 6, 40, 1}) {
    accumulator.update(inputs.narrow(0, start, batch).unsqueeze(1));
    start += batch;
  }
  const at::Tensor first =
      at::cat({inputs.narrow(0, 0, 5), inputs.narrow(0, 10, 4), inputs.narrow(0, 20, 21), inputs.narrow(0, 60, 1)});
  const at::Tensor second = at::cat({inputs.narrow(0, 5, 5), inputs.narrow(0, 14, 6), inputs.narrow(0, 41, 19)});
  EXPECT_EQ(accumulator.half_tokens(0), 31);
  EXPECT_EQ(accumulator.half_tokens(1), 30);
  EXPECT_TRUE(at::allclose(accumulator.half(0), first.mT().matmul(first) / 31));
  EXPECT_TRUE(at::allclose(accumulator.half(1), second.mT().matmul(second) / 30));
}

TEST(Ridge, HalvesNameWhatTheyWant) {
  HessianAccumulator accumulator(3, at::kDouble, Halves::kApart);
  EXPECT_EQ(message_of<c10::ValueError>([&] { return accumulator.half(0); }),
            "HessianAccumulator: expected at least one token in either half, but got 0 in all");
  EXPECT_EQ(message_of<c10::ValueError>([&] { return accumulator.half(2); }),
            "HessianAccumulator: expected half to be 0 or 1, but got 2");
  EXPECT_EQ(accumulator.half_tokens(1), 0);
  EXPECT_EQ(message_of<c10::ValueError>([&] { return accumulator.half_tokens(-1); }),
            "HessianAccumulator: expected half to be 0 or 1, but got -1");
  EXPECT_EQ(message_of<c10::ValueError>([&] { return HessianAccumulator(3).half(0); }),
            "HessianAccumulator: expected halves that are kept apart (Halves::kApart), but they are not");
}

TEST(Ridge, TheChoiceIsWhatWasJudgedBest) {
  const at::Tensor weight = testing::normal({150, 64}, 1);
  const HessianAccumulator accumulator = accumulate(testing::normal({40, 64}, 2));
  const RidgeChoice choice = choose_ridge(weight, accumulator);
  ASSERT_EQ(choice.ridges.size(), choice.held_out.size());
  EXPECT_EQ(choice.held_out.back(), 1.0);
  const auto least = std::ranges::min_element(choice.held_out);
  EXPECT_EQ(choice.ridge, choice.ridges[least - choice.held_out.begin()]);
  // White inputs, fewer than the weight's columns: they say nothing of others.
  EXPECT_GT(choice.ridge, 10);
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
