#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linalg_cholesky.h>
#include <ATen/ops/linalg_eigvalsh.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "algorithms/damping.h"
#include "algorithms/factorization.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();

at::Tensor positive_definite(int64_t columns) {
  return damp(testing::hessian_of_inputs(columns, columns / 2 + 2, 1), 0.01, at::kDouble).matrix;
}

// one column; a block of 128 less one, itself and plus one; several blocks, the first not filled
const std::vector<int64_t> kSizes = {1, 2, 127, 128, 129, 300};

// A perturbation of eps |A| moves a Cholesky factor by up to eps cond(A) / sqrt(2) relative to its norm (Sun 1991), and
// both factors have such an error: 2 eps cond.
TEST(Factorization, IsTheCholeskyFactorOfTheReversedMatrixReversed) {
  for (const int64_t columns : kSizes) {
    const at::Tensor matrix = positive_definite(columns);
    const at::Tensor eigenvalues = at::linalg_eigvalsh(matrix);
    const double condition = (eigenvalues[-1] / eigenvalues[0]).item<double>();
    const at::Tensor upper = at::linalg_cholesky(matrix.flip({0, 1})).flip({0, 1});  // matrix = upper upper^T
    at::Tensor factored = matrix.clone();
    ASSERT_TRUE(factor_from_last_row(factored)) << columns;
    const double error = (factored.tril() - upper.mT()).norm().item<double>() / upper.norm().item<double>();
    EXPECT_LE(error, 2 * kEps * condition) << columns << " columns, condition " << condition;
  }
}

// |A - L^T L| <= (K + 1) eps |L^T| |L|, componentwise (Higham, theorem 10.3).
TEST(Factorization, FactorTimesItsTransposeIsTheMatrix) {
  for (const int64_t columns : kSizes) {
    const at::Tensor matrix = positive_definite(columns);
    at::Tensor factored = matrix.clone();
    ASSERT_TRUE(factor_from_last_row(factored)) << columns;
    const at::Tensor l = factored.tril();
    const at::Tensor bound = l.abs().mT().matmul(l.abs()).mul_(static_cast<double>(columns + 1) * kEps);
    EXPECT_TRUE((l.mT().matmul(l) - matrix).abs().le(bound).all().item<bool>()) << columns;
  }
}

TEST(Factorization, ReadsAndWritesTheLowerTriangleAlone) {
  for (const int64_t columns : {5, 129}) {
    const at::Tensor matrix = positive_definite(columns);
    at::Tensor clean = matrix.clone();
    ASSERT_TRUE(factor_from_last_row(clean));
    at::Tensor marked = matrix.tril() + at::full_like(matrix, 7.0).triu(1);
    ASSERT_TRUE(factor_from_last_row(marked));
    EXPECT_TRUE(at::equal(marked.tril(), clean.tril())) << columns;
    EXPECT_TRUE(at::equal(marked.triu(1), at::full_like(matrix, 7.0).triu(1))) << columns;
  }
}

TEST(Factorization, FailsWhereverAPivotIsNotPositive) {
  constexpr int64_t kColumns = 300;
  // the last row, its block's first row, the row before that block, the first row of all
  for (const int64_t bad : {299, 172, 171, 0}) {
    for (const double pivot : {-1e3, std::numeric_limits<double>::quiet_NaN()}) {
      at::Tensor matrix = positive_definite(kColumns);
      matrix[bad][bad] = pivot;
      EXPECT_FALSE(factor_from_last_row(matrix)) << bad << ", " << pivot;
    }
  }
  at::Tensor matrix = at::ones({2, 2}, at::kDouble);
  EXPECT_FALSE(factor_from_last_row(matrix)) << "singular";
}

TEST(Factorization, AcceptsAnEmptyMatrix) { EXPECT_TRUE(factor_from_last_row(at::empty({0, 0}, at::kDouble))); }

TEST(Factorization, ThreadsDoNotChangeABit) {
  const at::Tensor matrix = positive_definite(300);
  at::Tensor one = matrix.clone();
  at::Tensor two = matrix.clone();
  {
    const testing::ScopedThreads threads(1);
    ASSERT_TRUE(factor_from_last_row(one));
  }
  const testing::ScopedThreads threads(2);
  ASSERT_TRUE(factor_from_last_row(two));
  EXPECT_TRUE(at::equal(one, two));
}

}  // namespace
}  // namespace miniquant::algorithms
