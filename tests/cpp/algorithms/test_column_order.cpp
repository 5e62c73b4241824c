#include <ATen/TensorOperators.h>
#include <ATen/ops/diag.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cstdint>

#include "algorithms/column_order.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

TEST(ColumnOrder, ActivationOrderIsDescendingDiagonalAndStableAtTies) {
  const at::Tensor hessian = at::diag(at::tensor({1.0, 3.0, 2.0, 3.0, 0.0, 2.0}, at::kDouble));
  EXPECT_TRUE(
      at::equal(order_of_columns(hessian, ColumnOrder::kActivation, 64), at::tensor({1, 3, 2, 5, 0, 4}, at::kLong)));
  EXPECT_TRUE(
      at::equal(order_of_columns(hessian, ColumnOrder::kNatural, 64), at::tensor({0, 1, 2, 3, 4, 5}, at::kLong)));
}

TEST(ColumnOrder, WholeGroupsByMeanDiagonalAShorterOneLast) {
  const at::Tensor hessian = at::diag(at::tensor({1.0, 2.0, 5.0, 4.0, 3.0, 6.0, 9.0}, at::kDouble));
  // Independent columns keep the order of their diagonal.
  EXPECT_TRUE(
      at::equal(order_of_columns(hessian, ColumnOrder::kGroup, 2), at::tensor({2, 3, 5, 4, 1, 0, 6}, at::kLong)));
}

// In a group of correlated columns the last is that of least diagonal; before it comes the column that it explains
// best.
TEST(ColumnOrder, WithinAGroupTheLeastVarianceGivenThoseBehindComesLast) {
  at::Tensor hessian = at::diag(at::tensor({4.0, 2.0, 1.0}, at::kDouble));
  hessian[0][2] = hessian[2][0] = 1.9;  // leaves 4 - 1.9^2 = 0.39 of column 0
  EXPECT_TRUE(at::equal(order_of_columns(hessian, ColumnOrder::kGroup, 3), at::tensor({1, 0, 2}, at::kLong)));
}

TEST(ColumnOrder, DoesNotDependOnTheScaleOfTheHessian) {
  const at::Tensor hessian = testing::hessian_of_inputs(50, 80, 1);
  for (const ColumnOrder order : {ColumnOrder::kActivation, ColumnOrder::kGroup}) {
    for (const double factor : {0x1p-900, 0x1p-200, 0x1p900}) {
      EXPECT_TRUE(at::equal(order_of_columns(hessian * factor, order, 16), order_of_columns(hessian, order, 16)));
    }
  }
}

}  // namespace
}  // namespace miniquant::algorithms
