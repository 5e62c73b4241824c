#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <miniquant/hessian.h>

#include "tensor_testing.h"

namespace miniquant {
namespace {

using testing::message_of;

TEST(HessianAccumulator, IsTheMeanOverAllTokensOfAnySplit) {
  const at::Tensor inputs = testing::normal({60, 12}, 4);
  const at::Tensor expected = inputs.mT().matmul(inputs) / 60;
  HessianAccumulator whole(12, at::kDouble);
  whole.update(inputs);
  EXPECT_EQ(whole.tokens(), 60);
  EXPECT_LE((whole.hessian() - expected).abs().max().item<double>(), 1e-14);
  HessianAccumulator parts(12, at::kDouble);
  parts.update(inputs.slice(0, 0, 24).view({2, 3, 4, 12}));
  parts.update(inputs[24]);
  parts.update(inputs.slice(0, 25, 25));
  parts.update(inputs.slice(0, 25));
  EXPECT_EQ(parts.tokens(), 60);
  EXPECT_LE((parts.hessian() - whole.hessian()).abs().max().item<double>(), 1e-14);
}

TEST(HessianAccumulator, GivesATensorOfItsOwn) {
  HessianAccumulator accumulator(3);
  accumulator.update(testing::normal({5, 3}, 5));
  EXPECT_EQ(accumulator.hessian().scalar_type(), at::kFloat);
  const at::Tensor before = accumulator.hessian();
  accumulator.hessian().zero_();
  EXPECT_TRUE(at::equal(accumulator.hessian(), before));
}

TEST(HessianAccumulator, ABadBatchCountsNothing) {
  HessianAccumulator accumulator(3);
  accumulator.update(testing::normal({5, 3}, 6));
  const at::Tensor before = accumulator.hessian();
  EXPECT_EQ(message_of<c10::ValueError>([&] { accumulator.update(at::zeros({2, 4})); }),
            "hessian_update_: expected inputs to have shape [..., K] = [..., 3], but got shape [2, 4]");
  EXPECT_EQ(accumulator.tokens(), 5);
  EXPECT_TRUE(at::equal(accumulator.hessian(), before));
}

TEST(HessianAccumulator, SaysWhatIsWrong) {
  EXPECT_EQ(message_of<c10::ValueError>([] { HessianAccumulator(-1); }),
            "HessianAccumulator: expected in_features to be at least 0, but got -1");
  EXPECT_EQ(message_of<c10::TypeError>([] { HessianAccumulator(3, at::kHalf); }),
            "HessianAccumulator: expected dtype to be float32 or float64, but got float16");
  EXPECT_EQ(message_of<c10::ValueError>([] { (void)HessianAccumulator(3).hessian(); }),
            "HessianAccumulator: expected at least one token before hessian(), but got none");
}

TEST(HessianAccumulator, HalvesAreSumsOfTheirOwn) {
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
TEST(HessianAccumulator, LaterBatchesStayWholeAndGoWhereFewerTokensAre) {
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

TEST(HessianAccumulator, HalvesNameWhatTheyWant) {
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

}  // namespace
}  // namespace miniquant
