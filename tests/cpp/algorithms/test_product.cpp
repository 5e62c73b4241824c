#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string_view>

#include "algorithms/product.h"
#include "kernels/bf16.h"
#include "kernels/instruction_set.h"
#include "kernels/kernels.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

struct Size {
  int64_t tokens;
  int64_t rows;
  int64_t columns;
};

// One token; sides of one tile, of some, and of more than a run of tiles; the tokens of one pass, and one more.
constexpr Size kSizes[] = {{1, 1, 1}, {3, 5, 70}, {97, 200, 1}, {1024, 33, 40}, {1025, 300, 130}};

// Higham's bound for a sum of n products, in any order, that is added to a sum: (n + 2) eps (|A| + |X|^T |Y|).
TEST(Product, IsTheProductOfBoth) {
  for (const Multiplier multiplier : {Multiplier::kKernels, Multiplier::kAten}) {
    for (const Size& size : kSizes) {
      for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
        const at::Tensor left = testing::normal({size.tokens, size.rows}, 1, at::kFloat);
        const at::Tensor right = testing::normal({size.tokens, size.columns}, 2, at::kFloat);
        at::Tensor sum = testing::normal({size.rows, size.columns}, 3, dtype);
        const at::Tensor wide_left = left.to(at::kDouble);
        const at::Tensor wide_right = right.to(at::kDouble);
        const at::Tensor expected = sum.to(at::kDouble) + wide_left.mT().matmul(wide_right);
        const double eps =
            dtype == at::kFloat ? std::numeric_limits<float>::epsilon() : std::numeric_limits<double>::epsilon();
        const at::Tensor magnitude = sum.to(at::kDouble).abs() + wide_left.abs().mT().matmul(wide_right.abs());
        product_update(sum, left, right, multiplier);
        EXPECT_TRUE((sum.to(at::kDouble) - expected)
                        .abs()
                        .le(static_cast<double>(size.tokens + 2) * eps * magnitude)
                        .all()
                        .item<bool>())
            << size.tokens << ", " << size.rows << ", " << size.columns;
      }
    }
  }
}

TEST(Product, DoesNotDependOnThreadsOrStrides) {
  const at::Tensor left = testing::normal({1025, 300}, 1, at::kFloat);
  const at::Tensor right = testing::normal({1025, 130}, 2, at::kFloat);
  const auto product_of = [&](int threads, const at::Tensor& x, const at::Tensor& y) {
    const testing::ScopedThreads scoped(threads);
    at::Tensor sum = at::zeros({300, 130}, at::kFloat);
    product_update(sum, x, y, Multiplier::kKernels);
    return sum;
  };
  const at::Tensor expected = product_of(1, left, right);
  for (const int threads : {2, 3}) {
    EXPECT_TRUE(at::equal(product_of(threads, left, right), expected)) << threads;
  }
  EXPECT_TRUE(at::equal(product_of(1, left.mT().contiguous().mT(), right.mT().contiguous().mT()), expected));
  at::Tensor storage = at::zeros({130, 600}, at::kFloat);
  at::Tensor strided = storage.mT().slice(0, 0, 600, 2);
  product_update(strided, left, right, Multiplier::kKernels);
  EXPECT_TRUE(at::equal(strided, expected));
  EXPECT_EQ(storage.slice(1, 1, 600, 2).abs().sum().item<double>(), 0.0);
}

TEST(Product, CastsToTheDtypeOfTheSum) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kDouble}) {
    const at::Tensor left = testing::normal({20, 6}, 1, dtype);
    const at::Tensor right = testing::normal({20, 9}, 2, dtype);
    at::Tensor sum = at::zeros({6, 9}, at::kFloat);
    at::Tensor of_cast = sum.clone();
    product_update(sum, left, right, Multiplier::kKernels);
    product_update(of_cast, left.to(at::kFloat), right.to(at::kFloat), Multiplier::kKernels);
    EXPECT_TRUE(at::equal(sum, of_cast)) << dtype;
  }
}

TEST(Product, OfValuesOf16BitsTakesTheirKernelsWhereThereAreSome) {
  const at::Tensor left = testing::normal({600, 40}, 1, at::kBFloat16);
  const at::Tensor right = testing::normal({600, 70}, 2, at::kBFloat16);
  at::Tensor sum = at::zeros({40, 70}, at::kFloat);
  const Multiplier fastest = fastest_multiplier(sum, left, right);
  EXPECT_EQ(fastest == Multiplier::kBf16, kernels::bf16_kernels() != nullptr);
  EXPECT_NE(fastest_multiplier(sum, left.to(at::kFloat), right), Multiplier::kBf16);
  at::Tensor expected = sum.clone();
  at::Tensor strided = at::zeros({70, 40}, at::kFloat).mT();
  product_update(sum, left, right);
  product_update(expected, left, right, fastest);
  EXPECT_TRUE(at::equal(sum, expected));
  product_update(strided, left, right);
  EXPECT_TRUE(at::equal(strided, expected));
}

TEST(Product, OfFloat32TakesAtenWhereMklHasVectorsAsLong) {
  const std::string_view instruction_set = kernels::name(kernels::kernels().instruction_set);
  bool as_long = instruction_set == "avx2" || instruction_set == "baseline";
#if defined(__x86_64__)
  as_long = as_long || (instruction_set == "avx512" && __builtin_cpu_is("intel") != 0);
#endif
  const at::Tensor x = testing::normal({8, 40}, 1, at::kFloat);
  EXPECT_EQ(fastest_multiplier(at::zeros({40, 40}, at::kFloat), x, x),
            at::hasMKL() && as_long ? Multiplier::kAten : Multiplier::kKernels);
}

TEST(Product, OfNothingChangesNothing) {
  for (const Size& size : {Size{0, 3, 4}, {2, 0, 4}, {2, 3, 0}}) {
    at::Tensor sum = testing::normal({size.rows, size.columns}, 1);
    const at::Tensor before = sum.clone();
    product_update(sum, testing::normal({size.tokens, size.rows}, 2), testing::normal({size.tokens, size.columns}, 3));
    EXPECT_TRUE(at::equal(sum, before));
  }
}

}  // namespace
}  // namespace miniquant::algorithms
