#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>
#include <miniquant/hessian.h>

#include <limits>
#include <optional>
#include <thread>
#include <vector>

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

TEST(HessianAccumulator, MayTakeLessExactProducts) {
  const at::Tensor inputs = testing::normal({60, 12}, 4, at::kFloat);
  const at::Tensor wide = inputs.to(at::kDouble);
  const at::Tensor bound = wide.abs().mT().matmul(wide.abs()) * 1.3e-4;
  HessianAccumulator accumulator(12, at::kFloat, Halves::kTogether, HessianPrecision::kBf16x3);
  accumulator.update(inputs);
  EXPECT_TRUE((accumulator.hessian().to(at::kDouble) * 60 - wide.mT().matmul(wide)).abs().le(bound).all().item<bool>());
  at::Tensor hessian = at::zeros({12, 12});
  hessian_update_(hessian, inputs, std::nullopt, HessianPrecision::kBf16x3);
  EXPECT_TRUE(at::equal(hessian / 60, accumulator.hessian()));
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
            "HessianAccumulator: expected inputs to have shape [..., K] = [..., 3], but got shape [2, 4]");
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

// The batches and halves of the test of the same name in tests/python/test_ridge.py: both accumulators split alike.
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
            "HessianAccumulator: expected at least one token in each half, but got 0 in total");
  EXPECT_EQ(message_of<c10::ValueError>([&] { return accumulator.half(2); }),
            "HessianAccumulator: expected half to be 0 or 1, but got 2");
  EXPECT_EQ(accumulator.half_tokens(1), 0);
  EXPECT_EQ(message_of<c10::ValueError>([&] { return accumulator.half_tokens(-1); }),
            "HessianAccumulator: expected half to be 0 or 1, but got -1");
  EXPECT_EQ(
      message_of<c10::ValueError>([&] { return HessianAccumulator(3).half(0); }),
      "HessianAccumulator: expected halves that are kept apart (halves=True; Halves::kApart in C++), but they are not");
}

/// The state of an accumulator, to check that a rejected call changed nothing.
struct Kept {
  int64_t tokens;
  at::Tensor hessian;
  explicit Kept(const HessianAccumulator& accumulator) : tokens(accumulator.tokens()), hessian(accumulator.hessian()) {}
  [[nodiscard]] bool is_still_in(const HessianAccumulator& accumulator) const {
    return accumulator.tokens() == tokens && at::equal(accumulator.hessian(), hessian);
  }
};

// The first half of this batch is valid: it must not be added either.
TEST(HessianAccumulator, ARefusedBatchChangesNothingAndIsNamedByItsOwnPosition) {
  HessianAccumulator accumulator(2, at::kFloat, Halves::kApart);
  accumulator.update(at::ones({2, 2}));
  const Kept before(accumulator);
  at::Tensor batch = at::ones({2, 3, 2});
  batch[1][2][0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(message_of<c10::ValueError>([&] { accumulator.update(batch); }),
            "HessianAccumulator: expected inputs to be finite, but got nan at [1, 2, 0]");
  EXPECT_TRUE(before.is_still_in(accumulator));
  batch[1][2][0] = 1e20;
  EXPECT_EQ(message_of<c10::ValueError>([&] { accumulator.update(batch); }),
            "HessianAccumulator: expected inputs whose products keep the sums finite in float32 (float64 "
            "sums have a larger range), but got 1e+20 at [1, 2, 0]");
  EXPECT_TRUE(before.is_still_in(accumulator));
  EXPECT_EQ(accumulator.half_tokens(0), 1);
}

TEST(HessianAccumulator, AMaskLeavesTokensOut) {
  const at::Tensor inputs = testing::normal({4, 5, 6}, 1);
  at::Tensor mask = at::ones({4, 5}, at::kBool);
  mask[1][3] = false;
  mask[3].fill_(false);
  const at::Tensor kept = inputs.flatten(0, 1).index_select(0, mask.flatten().nonzero().squeeze(1));
  at::Tensor padded = inputs.clone();
  padded[3].fill_(std::numeric_limits<double>::quiet_NaN());
  for (const Halves halves : {Halves::kTogether, Halves::kApart}) {
    HessianAccumulator masked(6, at::kDouble, halves);
    masked.update(padded, mask);
    HessianAccumulator expected(6, at::kDouble, halves);
    expected.update(kept);
    EXPECT_EQ(masked.tokens(), 14);
    EXPECT_EQ(masked.effective_tokens(), 14);
    EXPECT_TRUE(at::equal(masked.hessian(), expected.hessian()));
  }
}

TEST(HessianAccumulator, WeightsCountTokensAsOftenAsTheySay) {
  const at::Tensor inputs = testing::normal({3, 6}, 1);
  HessianAccumulator weighted(6, at::kDouble);
  weighted.update(inputs, std::nullopt, at::tensor({3.0, 0.0, 1.0}));
  HessianAccumulator repeated(6, at::kDouble);
  repeated.update(at::cat({inputs.narrow(0, 0, 1).expand({3, 6}), inputs.narrow(0, 2, 1)}));
  EXPECT_TRUE(at::allclose(weighted.hessian(), repeated.hessian(), 1e-14, 0));
  EXPECT_EQ(weighted.tokens(), 2);
  EXPECT_DOUBLE_EQ(weighted.effective_tokens(), 16.0 / 10);
}

TEST(HessianAccumulator, MergesAndGoesOnFromItsState) {
  const at::Tensor inputs = testing::normal({30, 6}, 1);
  HessianAccumulator first(6, at::kDouble, Halves::kApart);
  HessianAccumulator second(6, at::kDouble, Halves::kApart);
  first.update(inputs.narrow(0, 0, 11));
  second.update(inputs.narrow(0, 11, 19));
  HessianAccumulator all(first.state());
  all.merge(second);
  EXPECT_EQ(all.tokens(), 30);
  EXPECT_EQ(all.half_tokens(0), 16);
  EXPECT_TRUE(at::allclose(all.hessian(), inputs.mT().matmul(inputs) / 30));
  EXPECT_EQ(first.tokens(), 11) << "the state is a copy";
  EXPECT_EQ(message_of<c10::ValueError>([&] { all.merge(HessianAccumulator(6, at::kDouble)); }),
            "HessianAccumulator: expected other sums to have the shape of the sums [2, 6, 6] (in_features, and halves "
            "kept apart or not), but got shape [1, 6, 6]");
  EXPECT_EQ(all.tokens(), 30);
}

TEST(HessianAccumulator, MadeInInferenceModeIsUpdatedOutside) {
  const c10::InferenceMode inference;
  HessianAccumulator accumulator(2);
  accumulator.update(at::ones({3, 2}));
  {
    const c10::InferenceMode normal(false);
    accumulator.update(at::ones({3, 2}));
  }
  EXPECT_EQ(accumulator.tokens(), 6);
  EXPECT_TRUE(at::equal(accumulator.hessian(), at::ones({2, 2})));
}

TEST(HessianAccumulator, ThreadsMayShareOne) {
  constexpr int kThreads = 8;
  constexpr int kBatches = 50;
  const at::Tensor inputs = testing::normal({7, 40}, 1).round();  // sums of integers are exact in any order
  HessianAccumulator accumulator(40, at::kDouble, Halves::kApart);
  at::Tensor sum = at::zeros({40, 40}, at::kDouble);
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      for (int batch = 0; batch < kBatches; ++batch) {
        accumulator.update(inputs);
        hessian_update_(sum, inputs);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  const at::Tensor expected = inputs.mT().matmul(inputs) * (kThreads * kBatches);
  EXPECT_TRUE(at::equal(sum, expected));
  EXPECT_EQ(accumulator.tokens(), 7 * kThreads * kBatches);
  EXPECT_TRUE(at::equal(accumulator.hessian(), expected / (7 * kThreads * kBatches)));
}

}  // namespace
}  // namespace miniquant
