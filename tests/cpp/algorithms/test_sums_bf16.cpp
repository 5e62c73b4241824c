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
#include "algorithms/sums_bf16.h"
#include "kernels/bf16.h"
#include "kernels/instruction_set.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

using kernels::Bf16Unit;

/// kNone stands for the emulation.
class SumsBf16 : public ::testing::TestWithParam<Bf16Unit> {
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
    add_bf16_squares(bf16_kernels(), hessian, inputs, token_weights);
    return hessian;
  }
  static at::Tensor product_of(const at::Tensor& left, const at::Tensor& right) {
    at::Tensor sum = at::zeros({left.size(1), right.size(1)}, at::kFloat);
    add_bf16_products(bf16_kernels(), sum, left, right);
    return sum;
  }
};
INSTANTIATE_TEST_SUITE_P(Units, SumsBf16, ::testing::ValuesIn(kernels::kBf16Units), [](const auto& unit) {
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

TEST_P(SumsBf16, IsTheProductOfTheInputsInFloat64) {
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
TEST_P(SumsBf16, OfFloat32InputsHasThreeProductsForEach) {
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

TEST_P(SumsBf16, OfFloat32InputsThatAreBfloat16ValuesIsThatOfThese) {
  const at::Tensor inputs = testing::normal({600, 70}, 2, at::kBFloat16);
  EXPECT_TRUE(at::allclose(sum_of(inputs.to(at::kFloat)), sum_of(inputs), 1e-6, 1e-5));
}

TEST_P(SumsBf16, AddsToBothTrianglesOfWhatIsThere) {
  const at::Tensor inputs = testing::normal({3, 40}, 3, at::kBFloat16);
  at::Tensor hessian = testing::normal({40, 40}, 4, at::kFloat);
  const at::Tensor before = hessian.clone();
  add_bf16_squares(bf16_kernels(), hessian, inputs, {});
  EXPECT_TRUE(at::equal(hessian, before + sum_of(inputs)));
}

TEST_P(SumsBf16, OfTwoBatchesIsTheirProductInFloat64) {
  // one token, one row, one column; odd sizes; one side of several squares; several runs; several passes
  struct Size {
    int64_t tokens;
    int64_t rows;
    int64_t columns;
  };
  constexpr Size kSizes[] = {{1, 1, 1}, {5, 30, 3}, {33, 1, 600}, {513, 600, 17}, {2000, 37, 70}, {3000, 330, 290}};
  constexpr double kTokensPerSum = 64;
  for (const auto& [tokens, rows, columns] : kSizes) {
    for (const at::ScalarType left_dtype : {at::kBFloat16, at::kHalf}) {
      for (const at::ScalarType right_dtype : {at::kBFloat16, at::kHalf}) {
        SCOPED_TRACE(::testing::Message()
                     << tokens << " tokens, " << rows << " x " << columns << ", " << left_dtype << ", " << right_dtype);
        const at::Tensor left = testing::normal({tokens, rows}, 1, left_dtype);
        const at::Tensor right = testing::normal({tokens, columns}, 2, right_dtype);
        const at::Tensor wide_left = left.to(at::kDouble);
        const at::Tensor wide_right = right.to(at::kDouble);
        const at::Tensor magnitude = wide_left.abs().mT().matmul(wide_right.abs());
        const double terms = kTokensPerSum + static_cast<double>(tokens) / kTokensPerSum + 2;
        const at::Tensor error = product_of(left, right).to(at::kDouble) - wide_left.mT().matmul(wide_right);
        EXPECT_TRUE(error.abs().le(magnitude * (terms * std::numeric_limits<float>::epsilon())).all().item<bool>());
      }
    }
  }
}

TEST_P(SumsBf16, OfTwoBatchesAddsToWhatIsThere) {
  const at::Tensor left = testing::normal({40, 20}, 3, at::kBFloat16);
  const at::Tensor right = testing::normal({40, 50}, 4, at::kBFloat16);
  at::Tensor sum = testing::normal({20, 50}, 5, at::kFloat);
  const at::Tensor before = sum.clone();
  add_bf16_products(bf16_kernels(), sum, left, right);
  EXPECT_TRUE(at::equal(sum, before + product_of(left, right)));
  EXPECT_TRUE(at::equal(product_of(left.mT().contiguous().mT(), right.mT().contiguous().mT()), product_of(left, right)))
      << "strides";
}

TEST_P(SumsBf16, ThreadsDoNotChangeABitOfAProduct) {
  const at::Tensor left = testing::normal({600, 300}, 7, at::kBFloat16);
  const at::Tensor right = testing::normal({600, 700}, 8, at::kBFloat16);
  const auto product_with = [&](int threads) {
    const testing::ScopedThreads scoped(threads);
    return product_of(left, right);
  };
  const at::Tensor one = product_with(1);
  EXPECT_TRUE(at::equal(product_with(2), one));
  EXPECT_TRUE(at::equal(product_with(3), one));
}

TEST_P(SumsBf16, ThreadsDoNotChangeABit) {
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
TEST_P(SumsBf16, TakesTurnsWithProductsOfTorch) {
  const testing::ScopedThreads threads(2);
  const at::Tensor inputs = testing::normal({256, 256}, 8, at::kBFloat16);
  const at::Tensor product = at::mm(inputs.mT(), inputs);
  const at::Tensor sum = sum_of(inputs);
  for (int turn = 0; turn < 4; ++turn) {
    EXPECT_TRUE(at::equal(at::mm(inputs.mT(), inputs), product)) << turn;
    EXPECT_TRUE(at::equal(sum_of(inputs), sum)) << turn;
  }
}

TEST_P(SumsBf16, StridesDoNotMatter) {
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

TEST(PrefersBf16, OfTwoBatchesWhereBothHave16Bits) {
  kernels::Bf16Kernels kernels = kernels::bf16_kernels_emulated;
  kernels.most_products = 2;
  const auto prefers = [&](at::ScalarType sum, at::ScalarType left, at::ScalarType right) {
    return prefers_bf16(&kernels, at::zeros({4, 3}, sum), at::zeros({2, 4}, left), at::zeros({2, 3}, right));
  };
  EXPECT_TRUE(prefers(at::kFloat, at::kBFloat16, at::kBFloat16));
  EXPECT_TRUE(prefers(at::kFloat, at::kHalf, at::kBFloat16));
  EXPECT_FALSE(prefers(at::kFloat, at::kHalf, at::kHalf)) << "four products";
  EXPECT_FALSE(prefers(at::kFloat, at::kFloat, at::kBFloat16));
  EXPECT_FALSE(prefers(at::kFloat, at::kBFloat16, at::kFloat));
  EXPECT_FALSE(prefers(at::kDouble, at::kBFloat16, at::kBFloat16));
  EXPECT_FALSE(prefers_bf16(nullptr, at::zeros({4, 3}, at::kFloat), at::zeros({2, 4}, at::kBFloat16),
                            at::zeros({2, 3}, at::kBFloat16)));
}

}  // namespace
}  // namespace miniquant::algorithms
