#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "algorithms/hessian.h"
#include "algorithms/hessian_bf16.h"
#include "kernels/bf16.h"
#include "kernels/instruction_set.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

using kernels::Bf16Unit;

/// kNone stands for the emulation.
class HessianBf16 : public ::testing::TestWithParam<Bf16Unit> {
 protected:
  void SetUp() override {
    if (!kernels::is_supported(GetParam())) {
      GTEST_SKIP() << "needs a CPU with " << kernels::name(GetParam());
    }
  }
  static const kernels::Bf16Kernels& bf16_kernels() {
    return GetParam() == Bf16Unit::kNone ? kernels::bf16_kernels_emulated : kernels::bf16_kernels_for(GetParam());
  }
  static at::Tensor sum_of(const at::Tensor& inputs, const at::Tensor& token_weights = {}) {
    at::Tensor hessian = at::zeros({inputs.size(1), inputs.size(1)}, at::kFloat);
    add_bf16_products(bf16_kernels(), hessian, inputs, token_weights);
    return hessian;
  }
};
INSTANTIATE_TEST_SUITE_P(Units, HessianBf16, ::testing::ValuesIn(kernels::kBf16Units), [](const auto& unit) {
  return unit.param == Bf16Unit::kNone ? "emulated" : kernels::name(unit.param);
});

at::Tensor weights_of(int64_t tokens) { return testing::normal({tokens}, 9).abs().add_(0.01); }

/// Powers of two from 2^-9 to 2^9.
at::Tensor powers_of_two(int64_t tokens) {
  return testing::normal({tokens}, 10).mul_(3).round_().clamp_(-9, 9).exp2_();
}

/// X^T diag(w) X of |X| in float64 where `magnitude`.
at::Tensor oracle(const at::Tensor& inputs, const at::Tensor& token_weights, bool magnitude) {
  at::Tensor wide = inputs.to(at::kDouble);
  wide = magnitude ? wide.abs() : wide;
  return wide.mT().matmul(token_weights.defined() ? wide * token_weights.unsqueeze(1) : wide);
}

/// As in test_hessian.cpp for the float32 kernels of AVX-512, whose short sums have 64 tokens: (tokens per sum + number
/// of sums) eps |X|^T |X|, and the rounding of weighted inputs.
at::Tensor bound(const at::Tensor& inputs, const at::Tensor& token_weights) {
  constexpr int64_t kTokensPerSum = 64;
  const int64_t sums = inputs.size(0) / kTokensPerSum + 1;
  const auto terms = static_cast<double>(kTokensPerSum + sums + 1);
  return oracle(inputs, token_weights, true) * (terms * std::numeric_limits<float>::epsilon());
}

TEST_P(HessianBf16, IsTheProductOfTheInputsInFloat64) {
  // one token, one column; odd sizes; the tokens of one run of sums, and one more; several runs; several passes of
  // float16
  for (const auto& [tokens, columns] : {std::pair{1, 1}, {5, 30}, {512, 13}, {513, 70}, {2000, 37}, {1100, 330}}) {
    for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
      const at::Tensor inputs = testing::normal({tokens, columns}, 1, dtype);
      for (const at::Tensor& weights : {at::Tensor(), weights_of(tokens), powers_of_two(tokens)}) {
        SCOPED_TRACE(::testing::Message() << tokens << " tokens, " << columns << " columns, " << dtype
                                          << (weights.defined() ? ", weighted" : ""));
        const at::Tensor sum = sum_of(inputs, weights);
        const at::Tensor error = (sum.to(at::kDouble) - oracle(inputs, weights, false)).abs();
        EXPECT_TRUE(error.le(bound(inputs, weights)).all().item<bool>());
        EXPECT_TRUE(at::equal(sum, sum.mT())) << "not symmetric";
      }
    }
  }
}

// Each value loses what is past its leading 16 bits, and each product that of both remainders.
TEST_P(HessianBf16, OfFloat32InputsHasThreeProductsForEach) {
  constexpr double kLost = 0x1p-13;
  for (const auto& [tokens, columns] : {std::pair{1, 1}, {5, 30}, {513, 70}, {2000, 37}, {1100, 330}}) {
    const at::Tensor inputs = testing::normal({tokens, columns}, 1, at::kFloat);
    for (const at::Tensor& weights : {at::Tensor(), weights_of(tokens), powers_of_two(tokens)}) {
      SCOPED_TRACE(::testing::Message() << tokens << " tokens, " << columns << " columns"
                                        << (weights.defined() ? ", weighted" : ""));
      const at::Tensor sum = sum_of(inputs, weights);
      const at::Tensor error = (sum.to(at::kDouble) - oracle(inputs, weights, false)).abs();
      const at::Tensor lost = oracle(inputs, weights, true) * kLost;
      EXPECT_TRUE(error.le(lost + bound(inputs, weights)).all().item<bool>());
      EXPECT_TRUE(at::equal(sum, sum.mT())) << "not symmetric";
      EXPECT_TRUE(tokens < 500 || error.gt(lost * 0.01).any().item<bool>()) << "not that many products";
    }
  }
}

TEST_P(HessianBf16, OfFloat32InputsThatAreBfloat16ValuesIsThatOfThese) {
  const at::Tensor inputs = testing::normal({600, 70}, 2, at::kBFloat16);
  EXPECT_TRUE(at::allclose(sum_of(inputs.to(at::kFloat)), sum_of(inputs), 1e-6, 1e-5));
}

TEST_P(HessianBf16, AddsToBothTrianglesOfWhatIsThere) {
  const at::Tensor inputs = testing::normal({3, 40}, 3, at::kBFloat16);
  at::Tensor hessian = testing::normal({40, 40}, 4, at::kFloat);
  const at::Tensor before = hessian.clone();
  add_bf16_products(bf16_kernels(), hessian, inputs, {});
  EXPECT_TRUE(at::equal(hessian, before + sum_of(inputs)));
}

TEST_P(HessianBf16, ThreadsDoNotChangeABit) {
  const at::Tensor inputs = testing::normal({600, 300}, 7, at::kBFloat16);
  const at::Tensor weights = weights_of(600);
  const auto sums_with = [&](int threads) {
    const testing::ScopedThreads scoped(threads);
    return std::pair(sum_of(inputs), sum_of(inputs, weights));
  };
  const auto [one, one_weighted] = sums_with(1);
  for (const int threads : {2, 3}) {
    const auto [sum, weighted] = sums_with(threads);
    EXPECT_TRUE(at::equal(sum, one)) << threads;
    EXPECT_TRUE(at::equal(weighted, one_weighted)) << threads;
  }
}

// torch's own products configure the same tiles, on the same threads.
TEST_P(HessianBf16, TakesTurnsWithProductsOfTorch) {
  const testing::ScopedThreads threads(2);
  const at::Tensor inputs = testing::normal({256, 256}, 8, at::kBFloat16);
  const at::Tensor product = at::mm(inputs.mT(), inputs);
  const at::Tensor sum = sum_of(inputs);
  for (int turn = 0; turn < 4; ++turn) {
    EXPECT_TRUE(at::equal(at::mm(inputs.mT(), inputs), product)) << turn;
    EXPECT_TRUE(at::equal(sum_of(inputs), sum)) << turn;
  }
}

TEST_P(HessianBf16, StridesDoNotMatter) {
  const at::Tensor inputs = testing::normal({40, 70}, 5, at::kBFloat16);
  EXPECT_TRUE(at::equal(sum_of(inputs.mT()), sum_of(inputs.mT().contiguous())));
}

TEST(PrefersBf16, WhereTheKernelsAreFasterAndAsAccurate) {
  kernels::Bf16Kernels kernels = kernels::bf16_kernels_emulated;
  kernels.most_products = 3;
  const at::Tensor single = at::zeros({4, 4}, at::kFloat);
  const at::Tensor wide = at::zeros({4, 4}, at::kDouble);
  const auto inputs = [](at::ScalarType dtype) { return at::zeros({2, 4}, dtype); };
  const at::Tensor weights = at::zeros({2}, at::kDouble).fill_(0.3);
  const at::Tensor powers = at::zeros({2}, at::kDouble).fill_(0.5);
  const auto prefers = [](const kernels::Bf16Kernels* chosen, const at::Tensor& hessian, const at::Tensor& batch,
                          const at::Tensor& token_weights, HessianPrecision precision = HessianPrecision::kFull) {
    return prefers_bf16(chosen, hessian, batch, token_weights, precision);
  };
  EXPECT_TRUE(prefers(&kernels, single, inputs(at::kBFloat16), {}));
  EXPECT_TRUE(prefers(&kernels, single, inputs(at::kBFloat16), weights));
  EXPECT_FALSE(prefers(nullptr, single, inputs(at::kBFloat16), {}));
  EXPECT_FALSE(prefers(&kernels, wide, inputs(at::kBFloat16), {}));
  EXPECT_FALSE(prefers(&kernels, single, inputs(at::kFloat), {}));
  EXPECT_TRUE(prefers(&kernels, single, inputs(at::kFloat), {}, HessianPrecision::kBf16x3));
  EXPECT_TRUE(prefers(&kernels, single, inputs(at::kFloat), weights, HessianPrecision::kBf16x3));
  EXPECT_FALSE(prefers(&kernels, wide, inputs(at::kFloat), {}, HessianPrecision::kBf16x3));
  EXPECT_FALSE(prefers(&kernels, single, inputs(at::kDouble), {}, HessianPrecision::kBf16x3));
  EXPECT_FALSE(prefers(&kernels, single, inputs(at::kHalf), {})) << "four products";
  EXPECT_FALSE(prefers(&kernels, single, inputs(at::kBFloat16), weights * 0x1p70));
  EXPECT_FALSE(prefers(&kernels, single, inputs(at::kBFloat16), weights * 0x1p-70));
  kernels.most_products = 1;
  EXPECT_TRUE(prefers(&kernels, single, inputs(at::kBFloat16), powers));
  EXPECT_FALSE(prefers(&kernels, single, inputs(at::kBFloat16), weights)) << "three products";
  EXPECT_FALSE(prefers(&kernels, single, inputs(at::kFloat), {}, HessianPrecision::kBf16x3)) << "three products";
  kernels.most_products = 4;
  EXPECT_TRUE(prefers(&kernels, single, inputs(at::kHalf), powers));
  EXPECT_FALSE(prefers(&kernels, single, inputs(at::kHalf), weights)) << "six products";
  EXPECT_TRUE(prefers(&kernels, single, inputs(at::kHalf), {}));
}

}  // namespace
}  // namespace miniquant::algorithms
