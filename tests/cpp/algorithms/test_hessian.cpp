#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <limits>

#include "algorithms/dispatch.h"
#include "algorithms/hessian.h"
#include "kernels/bf16.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

at::Tensor sum_of(const at::Tensor& inputs, at::ScalarType dtype) {
  at::Tensor hessian = at::zeros({inputs.size(-1), inputs.size(-1)}, dtype);
  hessian_update(hessian, inputs);
  return hessian;
}

// Sums of the tokens that two packed tiles of 12 KiB hold, added up: (tokens per sum + number of sums) eps |X|^T |X|,
// componentwise (kernels/rank_update-inl.h).
template <typename T>
at::Tensor bound(const at::Tensor& inputs) {
  const auto tokens_per_sum = 12288 / (typed_kernels<T>().tile_rows * static_cast<int64_t>(sizeof(T)));
  const int64_t sums = inputs.size(0) / tokens_per_sum + 1;
  const auto terms = static_cast<double>(tokens_per_sum + sums);
  return inputs.abs().mT().matmul(inputs.abs()) * (terms * std::numeric_limits<T>::epsilon());
}

TEST(Hessian, IsTheProductOfTheInputs) {
  // one token, one column; fewer tokens than columns; the tokens of one sum, and one more
  for (const auto& [tokens, columns] : {std::pair{1, 1}, {5, 30}, {256, 13}, {257, 100}, {1000, 25}}) {
    const at::Tensor inputs = testing::normal({tokens, columns}, 1, at::kFloat);
    const at::Tensor wide = inputs.to(at::kDouble);
    const at::Tensor expected = wide.mT().matmul(wide);
    const at::Tensor single = sum_of(inputs, at::kFloat).to(at::kDouble);
    EXPECT_TRUE((single - expected).abs().le(bound<float>(wide)).all().item<bool>());
    const at::Tensor twice = sum_of(inputs, at::kDouble);
    EXPECT_TRUE((twice - expected).abs().le(bound<double>(wide)).all().item<bool>());
    EXPECT_TRUE(at::equal(single, single.mT())) << "not symmetric";
  }
}

TEST(Hessian, AnySplitIntoBatchesIsTheSameToRounding) {
  const testing::ScopedThreads threads(1);
  const at::Tensor inputs = testing::normal({600, 40}, 2);
  const at::Tensor whole = sum_of(inputs, at::kDouble);
  const at::Tensor tolerance = 2 * bound<double>(inputs);
  for (const int64_t batch : {1, 7, 255, 256, 599}) {
    at::Tensor parts = at::zeros({40, 40}, at::kDouble);
    for (const at::Tensor& part : inputs.split(batch)) {
      hessian_update(parts, part);
    }
    EXPECT_TRUE((parts - whole).abs().le(tolerance).all().item<bool>()) << batch;
  }
}

TEST(Hessian, AddsToWhatIsThere) {
  const at::Tensor inputs = testing::normal({3, 4}, 3);
  at::Tensor hessian = at::zeros({4, 4}, at::kDouble).fill_(100);
  hessian_update(hessian, inputs);
  EXPECT_TRUE(at::equal(hessian, sum_of(inputs, at::kDouble) + 100));
}

TEST(Hessian, LeadingDimensionsAreTokens) {
  const at::Tensor inputs = testing::normal({2, 3, 5, 8}, 4);
  EXPECT_TRUE(at::equal(sum_of(inputs, at::kDouble), sum_of(inputs.reshape({30, 8}), at::kDouble)));
  EXPECT_TRUE(at::equal(sum_of(inputs[0][0][0], at::kDouble), sum_of(inputs[0][0][0].unsqueeze(0), at::kDouble)));
}

TEST(Hessian, StridesDoNotMatter) {
  const at::Tensor inputs = testing::normal({8, 30}, 5);
  EXPECT_TRUE(at::equal(sum_of(inputs.mT(), at::kDouble), sum_of(inputs.mT().contiguous(), at::kDouble)));
  at::Tensor storage = at::zeros({16, 16}, at::kDouble);
  at::Tensor strided = storage.slice(0, 0, 16, 2).slice(1, 0, 16, 2);
  hessian_update(strided, inputs.mT());
  EXPECT_TRUE(at::equal(strided, sum_of(inputs.mT(), at::kDouble)));
  EXPECT_EQ(storage.slice(0, 1, 16, 2).abs().sum().item<double>(), 0.0);
}

// A unit for bfloat16 sums in another order.
TEST(Hessian, CastsInputsToTheHessiansDtype) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kDouble}) {
    const at::Tensor inputs = testing::normal({20, 6}, 6, dtype);
    EXPECT_TRUE(at::equal(sum_of(inputs, at::kDouble), sum_of(inputs.to(at::kDouble), at::kDouble))) << dtype;
    const at::Tensor cast = sum_of(inputs.to(at::kFloat), at::kFloat);
    const at::Tensor sum = sum_of(inputs, at::kFloat);
    if (kernels::bf16_kernels() == nullptr || dtype == at::kDouble) {
      EXPECT_TRUE(at::equal(sum, cast)) << dtype;
    } else {
      const at::Tensor tolerance = 2 * bound<float>(inputs.to(at::kDouble));
      EXPECT_TRUE((sum - cast).abs().le(tolerance).all().item<bool>()) << dtype;
    }
  }
}

// More tokens than one pass takes, so the sum changes before all of them are read.
TEST(Hessian, InputsMayShareMemoryWithTheSum) {
  at::Tensor hessian = testing::normal({1100, 1100}, 4, at::kFloat);
  const at::Tensor inputs = hessian.clone();
  at::Tensor expected = hessian.clone();
  hessian_update(expected, inputs);
  hessian_update(hessian, hessian);
  EXPECT_TRUE(at::equal(hessian, expected));
}

TEST(Hessian, NoTokensAddNothing) {
  EXPECT_EQ(sum_of(at::zeros({0, 4}), at::kFloat).abs().sum().item<double>(), 0.0);
  EXPECT_EQ(sum_of(at::zeros({3, 0}), at::kFloat).numel(), 0);
}

TEST(Hessian, ThreadsDoNotChangeABit) {
  const at::Tensor inputs = testing::normal({300, 100}, 7, at::kFloat);
  at::Tensor one;
  {
    const testing::ScopedThreads threads(1);
    one = sum_of(inputs, at::kFloat);
  }
  const testing::ScopedThreads threads(2);
  EXPECT_TRUE(at::equal(sum_of(inputs, at::kFloat), one));
}

}  // namespace
}  // namespace miniquant::algorithms
