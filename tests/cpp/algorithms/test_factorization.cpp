#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linalg_cholesky.h>
#include <ATen/ops/linalg_eigvalsh.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "algorithms/factorization.h"
#include "algorithms/symmetric.h"
#include "algorithms/triangle_testing.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

// One column; a panel of 48 less one, itself and plus one; a block of four panels plus one; three blocks, the last
// panel partly filled.
constexpr int64_t kSizes[] = {1, 2, 47, 48, 49, 193, 500};

double eps(at::ScalarType dtype) {
  return dtype == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
}

at::Tensor positive_definite(int64_t columns, at::ScalarType dtype) {
  return testing::damped(testing::hessian_of_inputs(columns, columns / 2 + 2, 1), 0.01).to(dtype);
}

/// L [K, K] in float64, or nullopt.
std::optional<at::Tensor> factor(const at::Tensor& matrix) {
  const at::Tensor triangle = lower_triangle(matrix, 1.0, matrix.scalar_type());
  if (!factor_from_last_row(triangle, matrix.size(0))) {
    return std::nullopt;
  }
  return testing::dense_triangle(triangle, matrix.size(0)).to(at::kDouble);
}

class Factorization : public ::testing::TestWithParam<at::ScalarType> {};
INSTANTIATE_TEST_SUITE_P(Dtypes, Factorization, ::testing::Values(at::kFloat, at::kDouble),
                         [](const auto& dtype) { return std::string(c10::toString(dtype.param)); });

// A perturbation of eps |A| moves a Cholesky factor by up to eps cond(A) / sqrt(2) relative to its norm (Sun 1991).
// Both factors have such an error: 2 eps cond.
TEST_P(Factorization, IsTheCholeskyFactorOfTheReversedMatrixReversed) {
  for (const int64_t columns : kSizes) {
    const at::Tensor matrix = positive_definite(columns, GetParam());
    const at::Tensor wide = matrix.to(at::kDouble);
    const at::Tensor eigenvalues = at::linalg_eigvalsh(wide);
    const double condition = (eigenvalues[-1] / eigenvalues[0]).item<double>();
    const at::Tensor upper = at::linalg_cholesky(wide.flip({0, 1})).flip({0, 1});  // matrix = upper upper^T
    const std::optional<at::Tensor> l = factor(matrix);
    ASSERT_TRUE(l.has_value()) << columns;
    const double error = (*l - upper.mT()).norm().item<double>() / upper.norm().item<double>();
    EXPECT_LE(error, 2 * eps(GetParam()) * condition) << columns << " columns, condition " << condition;
  }
}

// |A - L^T L| <= (K + 1) eps |L^T| |L|, componentwise (Higham, theorem 10.3).
TEST_P(Factorization, FactorTimesItsTransposeIsTheMatrix) {
  for (const int64_t columns : kSizes) {
    const at::Tensor matrix = positive_definite(columns, GetParam());
    const std::optional<at::Tensor> l = factor(matrix);
    ASSERT_TRUE(l.has_value()) << columns;
    const at::Tensor bound = l->abs().mT().matmul(l->abs()).mul_(static_cast<double>(columns + 1) * eps(GetParam()));
    EXPECT_TRUE((l->mT().matmul(*l) - matrix).abs().le(bound).all().item<bool>()) << columns;
  }
}

TEST_P(Factorization, FailsWhereverAPivotIsNotPositive) {
  constexpr int64_t kColumns = 300;
  // the last row, its panel's first row, the row before that panel, a row of the first block, the first row
  for (const int64_t bad : {299, 288, 287, 100, 0}) {
    for (const double pivot : {-1e3, std::numeric_limits<double>::quiet_NaN()}) {
      at::Tensor matrix = positive_definite(kColumns, GetParam());
      matrix[bad][bad] = pivot;
      EXPECT_FALSE(factor(matrix).has_value()) << bad << ", " << pivot;
    }
  }
  EXPECT_FALSE(factor(at::ones({2, 2}, GetParam())).has_value()) << "singular";
}

// Rows that are set within the factorization, by any of two threads, give the bits of rows that are there before.
TEST_P(Factorization, SetsTheRowsOfTheMatrixItself) {
  const testing::ScopedThreads threads(2);
  for (const int64_t columns : kSizes) {
    const at::Tensor matrix = positive_definite(columns, GetParam());
    const at::Tensor diagonal = matrix.diagonal() * 1.5;
    at::Tensor expected = matrix.clone();
    expected.diagonal().copy_(diagonal);
    const LowerTriangleRows rows(matrix, 1.0, GetParam(), diagonal.contiguous());
    ASSERT_TRUE(factor_from_last_row(rows.triangle(), columns, [&](int64_t panel) { rows.set(panel); })) << columns;
    EXPECT_TRUE(at::equal(testing::dense_triangle(rows.triangle(), columns).to(at::kDouble), factor(expected).value()))
        << columns;
  }
}

TEST_P(Factorization, AcceptsAnEmptyMatrix) { EXPECT_TRUE(factor(at::empty({0, 0}, GetParam())).has_value()); }

TEST_P(Factorization, ThreadsDoNotChangeABit) {
  const at::Tensor matrix = positive_definite(500, GetParam());
  const auto with_threads = [&](int count) {
    const testing::ScopedThreads threads(count);
    return factor(matrix).value();
  };
  EXPECT_TRUE(at::equal(with_threads(1), with_threads(2)));
}

}  // namespace
}  // namespace miniquant::algorithms
