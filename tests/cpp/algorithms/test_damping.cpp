#include <ATen/ops/diag.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cstdint>

#include "algorithms/damping.h"
#include "algorithms/triangle_testing.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

using testing::message_of;

at::Tensor diagonal_matrix(std::initializer_list<double> values) {
  return at::diag(at::tensor(at::ArrayRef<double>(values)));
}

TEST(Damping, AddsTheRidgeRelativeToTheMeanDiagonal) {
  const at::Tensor hessian = diagonal_matrix({1, 2, 6}).add_(0.25);
  const DampedHessian damped = damp(hessian, 0.5, at::kDouble);
  EXPECT_EQ(damped.ridge, 0.5);
  EXPECT_EQ(damped.added, 0.5 * 3.25);
  EXPECT_TRUE(at::equal(damped.matrix, hessian + at::eye(3, hessian.options()) * (0.5 * 3.25)));
}

TEST(Damping, LeavesTheHessianAlone) {
  const at::Tensor hessian = diagonal_matrix({1, 2, 6});
  const at::Tensor before = hessian.clone();
  damp(hessian, 0.5, at::kDouble);
  EXPECT_TRUE(at::equal(hessian, before));
  with_dead_inputs_decoupled(hessian);
  EXPECT_TRUE(at::equal(hessian, before));
}

TEST(Damping, AveragesTheTwoTriangles) {
  at::Tensor hessian = diagonal_matrix({1, 2});
  hessian[0][1] = 0.5;
  hessian[1][0] = 0.75;
  const at::Tensor matrix = damp(hessian, 0.0, at::kDouble).matrix;
  EXPECT_EQ(matrix[0][1].item<double>(), 0.625);
  EXPECT_EQ(matrix[1][0].item<double>(), 0.625);
}

TEST(Damping, WorksInTheDtypeAskedFor) {
  const at::Tensor hessian = diagonal_matrix({1, 2}).to(at::kFloat);
  EXPECT_EQ(damp(hessian, 0.01, at::kDouble).matrix.scalar_type(), at::kDouble);
  EXPECT_EQ(damp(hessian, 0.01, at::kFloat).matrix.scalar_type(), at::kFloat);
}

TEST(Damping, AcceptsAnEmptyHessian) {
  const DampedHessian damped = damp(at::zeros({0, 0}, at::kDouble), 0.01, at::kDouble);
  EXPECT_EQ(damped.added, 0.0);
  EXPECT_EQ(damped.matrix.numel(), 0);
}

TEST(Damping, TheLowerTriangleIsDampedDecoupledAndPermuted) {
  for (const int64_t columns : {1, 48, 130}) {
    at::Tensor hessian = testing::hessian_of_inputs(columns, columns / 2 + 2, 1);
    hessian.select(0, columns / 2).zero_();
    hessian.select(1, columns / 2).zero_();
    const at::Tensor column = at::randperm(columns, at::kLong);
    for (const double ridge : {0.0, 0.1}) {
      const double added = added_to_diagonal(hessian, ridge);
      const at::Tensor expected = with_dead_inputs_decoupled(damp(hessian, ridge, at::kDouble).matrix)
                                      .index_select(0, column)
                                      .index_select(1, column);
      const at::Tensor triangle = damped_lower_triangle(hessian, added, at::kDouble, column);
      EXPECT_TRUE(at::equal(testing::dense_triangle(triangle, columns), expected.tril()))
          << columns << " columns, ridge " << ridge;
    }
  }
}

TEST(Damping, DeadInputsGetAPivotOfOneAndLiveOnesKeepTheirs) {
  const at::Tensor decoupled = with_dead_inputs_decoupled(diagonal_matrix({2, 0, 3, -1}));
  EXPECT_TRUE(at::equal(decoupled, diagonal_matrix({2, 1, 3, -1})));
}

TEST(Damping, MessageNamesTheLeadingMinorTheRidgeAndWhatToTry) {
  EXPECT_EQ(message_of<c10::LinAlgError>(
                [] { throw_not_positive_definite("gptq", damp(diagonal_matrix({1, 1, -1, 1}), 0.0, at::kDouble)); }),
            "gptq: expected hessian to be positive definite with ridge=0 (0 added to its diagonal), but the leading "
            "minor of order 3 is not; try ridge=0.1");
  EXPECT_EQ(message_of<c10::LinAlgError>(
                [] { throw_not_positive_definite("op", damp(diagonal_matrix({-5, 7}), 0.5, at::kDouble)); }),
            "op: expected hessian to be positive definite with ridge=0.5 (0.5 added to its diagonal), but the leading "
            "minor of order 1 is not; try ridge=5");
}

TEST(Damping, MessageWhereTheMatrixIsPositiveDefiniteInFloat64) {
  EXPECT_EQ(message_of<c10::LinAlgError>(
                [] { throw_not_positive_definite("gptq_reference", damp(diagonal_matrix({1, 1}), 0.0, at::kFloat)); }),
            "gptq_reference: expected hessian to be positive definite with ridge=0 (0 added to its diagonal), but it "
            "is not to working precision (all leading minors are positive in float64); try ridge=0.1");
}

// An input that is always 0 is not what makes a matrix indefinite.
TEST(Damping, MessagePassesOverDeadInputs) {
  EXPECT_NE(message_of<c10::LinAlgError>([] {
              throw_not_positive_definite("gptq", damp(diagonal_matrix({0, 1, -1}), 0.0, at::kDouble));
            }).find("leading minor of order 3 is not"),
            std::string::npos);
}

}  // namespace
}  // namespace miniquant::algorithms
