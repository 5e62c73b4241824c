#include <ATen/ops/diag.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "algorithms/damping.h"
#include "algorithms/triangle_testing.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

using testing::message_of;

at::Tensor diagonal_matrix(std::initializer_list<double> values) {
  return at::diag(at::tensor(at::ArrayRef<double>(values)));
}

/// The damped Hessian in the units of the Hessian.
at::Tensor damp(const at::Tensor& hessian, double ridge, at::ScalarType dtype = at::kDouble) {
  const Damping damping = damping_of(hessian, ridge);
  return damped_matrix(hessian, damping, dtype) * std::ldexp(1.0, damping.exponent);
}

TEST(Damping, AddsTheRidgeRelativeToTheMeanDiagonal) {
  const at::Tensor hessian = diagonal_matrix({1, 2, 6}).add_(0.25);
  const Damping damping = damping_of(hessian, 0.5);
  EXPECT_EQ(damping.ridge, 0.5);
  EXPECT_EQ(std::ldexp(damping.added, damping.exponent), 0.5 * 3.25);
  EXPECT_TRUE(at::equal(damp(hessian, 0.5), hessian + at::eye(3, hessian.options()) * (0.5 * 3.25)));
  EXPECT_TRUE(at::equal(damped_diagonal(hessian, damping), damped_matrix(hessian, damping, at::kDouble).diagonal()));
}

TEST(Damping, BringsTheLargestDiagonalEntryBetweenOneAndFour) {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    for (const int exponent : {-120, -4, 0, 6, 120}) {
      for (const int odd : {0, 1}) {
        const at::Tensor hessian = diagonal_matrix({1.5, 0.25}) * std::ldexp(1.0, exponent + odd);
        const Damping damping = damping_of(hessian.to(dtype), 0.5);
        EXPECT_EQ(damping.exponent, exponent);
        EXPECT_EQ(damping.factor, std::ldexp(1.0, -exponent));
        EXPECT_EQ(damping.added, std::ldexp(0.4375, odd));
      }
    }
  }
}

// The power of two is a normal number of the Hessian's dtype, whatever the size of its entries.
TEST(Damping, AcceptsTheSmallestAndTheLargestHessians) {
  const Damping small_float = damping_of(at::full({1, 1}, 0x1p-149, at::kFloat), 1.0);
  EXPECT_EQ(small_float.added, 0x1p-149 * small_float.factor);
  EXPECT_GE(1 / small_float.factor, 0x1p-126);
  const Damping large_double = damping_of(at::full({2, 2}, 0x1.8p1023, at::kDouble), 1.0);
  EXPECT_EQ(large_double.added, 0x1.8p3);
  const Damping small_double = damping_of(at::full({2, 2}, 0x1p-1074, at::kDouble), 1.0);
  EXPECT_EQ(small_double.added, 0x1p-54);
}

TEST(Damping, CountsALargeRidge) {
  EXPECT_EQ(damping_of(diagonal_matrix({1, 1}), 0x1p20).added, 1.0);
  EXPECT_TRUE(at::equal(damp(diagonal_matrix({1, 1}), 0x1p20), diagonal_matrix({0x1p20 + 1, 0x1p20 + 1})));
}

TEST(Damping, LeavesTheHessianAlone) {
  const at::Tensor hessian = diagonal_matrix({1, 2, 6});
  const at::Tensor before = hessian.clone();
  damp(hessian, 0.5);
  EXPECT_TRUE(at::equal(hessian, before));
}

TEST(Damping, AveragesTheTwoTriangles) {
  at::Tensor hessian = diagonal_matrix({1, 2});
  hessian[0][1] = 0.5;
  hessian[1][0] = 0.75;
  const at::Tensor matrix = damp(hessian, 0.0);
  EXPECT_EQ(matrix[0][1].item<double>(), 0.625);
  EXPECT_EQ(matrix[1][0].item<double>(), 0.625);
}

TEST(Damping, WorksInTheDtypeAskedFor) {
  const at::Tensor hessian = diagonal_matrix({1, 2}).to(at::kFloat);
  EXPECT_EQ(damp(hessian, 0.01, at::kDouble).scalar_type(), at::kDouble);
  EXPECT_EQ(damp(hessian, 0.01, at::kFloat).scalar_type(), at::kFloat);
}

TEST(Damping, AcceptsAnEmptyHessian) {
  const at::Tensor empty = at::zeros({0, 0}, at::kDouble);
  const Damping damping = damping_of(empty, 0.01);
  EXPECT_EQ(damping.added, 0.0);
  EXPECT_EQ(damped_matrix(empty, damping, at::kDouble).numel(), 0);
  EXPECT_EQ(dead_inputs(empty).numel(), 0);
}

TEST(Damping, TheLowerTriangleIsDampedAndPermuted) {
  for (const int64_t columns : {1, 48, 130}) {
    at::Tensor hessian = testing::hessian_of_inputs(columns, columns / 2 + 2, 1);
    hessian.select(0, columns / 2).zero_();
    hessian.select(1, columns / 2).zero_();
    const at::Tensor column = at::randperm(columns, at::kLong);
    for (const double ridge : {0.0, 0.1}) {
      const Damping damping = damping_of(hessian, ridge);
      const at::Tensor expected =
          damped_matrix(hessian, damping, at::kDouble).index_select(0, column).index_select(1, column);
      const at::Tensor triangle = damped_lower_triangle(hessian, damping, at::kDouble, column);
      EXPECT_TRUE(at::equal(testing::dense_triangle(triangle, columns), expected.tril()))
          << columns << " columns, ridge " << ridge;
    }
  }
}

TEST(Damping, DeadInputsAreThoseWithoutAnyEntry) {
  at::Tensor hessian = diagonal_matrix({2, 0, 3, 0, 0});
  hessian[0][3] = hessian[3][0] = 0.5;
  EXPECT_TRUE(at::equal(dead_inputs(hessian), at::tensor({1, 4}, at::kLong)));
}

std::string message_of_failure(const char* op, const at::Tensor& hessian, double ridge) {
  return message_of<c10::LinAlgError>([&] { throw_not_positive_definite(op, hessian, damping_of(hessian, ridge)); });
}

TEST(Damping, MessageNamesTheLeadingMinorTheRidgeAndWhatToTry) {
  EXPECT_EQ(message_of_failure("gptq", diagonal_matrix({1, 1, -1, 1}), 0.0),
            "gptq: expected hessian to be positive definite with ridge=0 (0 added to its diagonal), but the leading "
            "minor of order 3 is not; try ridge=0.01");
  EXPECT_EQ(message_of_failure("op", diagonal_matrix({-5, 7}), 0.5),
            "op: expected hessian to be positive definite with ridge=0.5 (0.5 added to its diagonal), but the leading "
            "minor of order 1 is not; try ridge=5");
  EXPECT_EQ(message_of_failure("op", diagonal_matrix({-5, 7}) * 0x1p-200, 0x1p-10),
            "op: expected hessian to be positive definite with ridge=0.000976562 (6.07716e-64 added to its diagonal), "
            "but the leading minor of order 1 is not; try ridge=0.00976562");
}

TEST(Damping, MessageProposesNoRidgeThatCannotHelp) {
  EXPECT_EQ(message_of_failure("op", diagonal_matrix({-5, 3}), 0.5),
            "op: expected hessian to be positive definite with ridge=0.5 (-0.5 added to its diagonal), but the leading "
            "minor of order 1 is not");
}

TEST(Damping, MessageWhereTheMatrixIsPositiveDefiniteInFloat64) {
  EXPECT_EQ(message_of_failure("gptq_reference", diagonal_matrix({1, 1}), 0.0),
            "gptq_reference: expected hessian to be positive definite with ridge=0 (0 added to its diagonal), but it "
            "is not to working precision (all leading minors are positive in float64); try ridge=0.01");
}

// A dead input does not make a matrix indefinite.
TEST(Damping, MessagePassesOverDeadInputs) {
  EXPECT_NE(message_of_failure("gptq", diagonal_matrix({0, 1, -1}), 0.0).find("leading minor of order 3 is not"),
            std::string::npos);
}

TEST(Damping, AZeroDiagonalWithARowThatIsNotZeroIsNamed) {
  at::Tensor hessian = diagonal_matrix({1, 0, 0, 1});
  hessian[2][0] = hessian[0][2] = 0.25;
  hessian[2][3] = hessian[3][2] = -0.5;
  EXPECT_EQ(message_of<c10::LinAlgError>([&] { check_dead_inputs("gptq", hessian, damping_of(hessian, 0.0)); }),
            "gptq: expected hessian to be positive definite with ridge=0 (0 added to its diagonal), but it has 0 at "
            "[2, 2] and -0.5 at [2, 3], but the row of an input that is always 0 must be all 0; try ridge=0.01");
  EXPECT_NO_THROW(check_dead_inputs("gptq", hessian, damping_of(hessian, 1.0)));
}

TEST(Damping, ANegativeDiagonalIsNamed) {
  EXPECT_EQ(
      message_of<c10::LinAlgError>([] { check_diagonal_not_negative("gptq", "hessian", diagonal_matrix({1, -2, 0})); }),
      "gptq: expected hessian to have a nonnegative diagonal, like every X X^T, but got -2 at [1, 1]");
  EXPECT_NO_THROW(check_diagonal_not_negative("gptq", "hessian", diagonal_matrix({1, 0})));
}

}  // namespace
}  // namespace miniquant::algorithms
