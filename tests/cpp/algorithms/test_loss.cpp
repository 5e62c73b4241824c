#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <limits>

#include "algorithms/loss.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

// e H e^T is a sum of K^2 terms: 2 (K + 3) eps |e| |H| |e|^T, doubled for the error of the oracle.
void expect_loss(const at::Tensor& loss, const at::Tensor& error, const at::Tensor& hessian) {
  const at::Tensor expected = (error.matmul(hessian) * error).sum(1);
  const at::Tensor magnitude = (error.abs().matmul(hessian.abs()) * error.abs()).sum(1);
  const double terms = 4.0 * static_cast<double>(error.size(1) + 3);
  const at::Tensor bound = magnitude * (terms * std::numeric_limits<double>::epsilon());
  EXPECT_TRUE((loss - expected).abs().le(bound).all().item<bool>()) << loss.sizes();
}

TEST(Loss, IsTheQuadraticFormOfEveryRow) {
  // one weight; one row; partly filled strips; a panel of rows plus one
  for (const auto& [rows, columns] : {std::pair{1, 1}, {1, 9}, {5, 66}, {97, 130}}) {
    const at::Tensor weight = testing::normal({rows, columns}, 1);
    const at::Tensor dequantized = weight + testing::normal({rows, columns}, 2) * 0.1;
    const at::Tensor hessian = testing::hessian_of_inputs(columns, 40, 3);
    expect_loss(quantization_loss(weight, dequantized, hessian), weight - dequantized, hessian);
  }
}

TEST(Loss, OfAnAsymmetricMatrixIsThatOfItsSymmetricPart) {
  const at::Tensor weight = testing::normal({4, 20}, 4);
  const at::Tensor dequantized = testing::normal({4, 20}, 5);
  const at::Tensor matrix = testing::normal({20, 20}, 6);
  expect_loss(quantization_loss(weight, dequantized, matrix), weight - dequantized, matrix);
}

TEST(Loss, IsAccumulatedInFloat64AndReturnedInTheComputeDtype) {
  for (const at::ScalarType dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    const at::Tensor weight = testing::normal({3, 50}, 7, dtype);
    const at::Tensor dequantized = testing::normal({3, 50}, 8, dtype);
    const at::Tensor hessian = testing::hessian_of_inputs(50, 60, 9, at::kFloat);
    const at::Tensor loss = quantization_loss(weight, dequantized, hessian);
    EXPECT_EQ(loss.scalar_type(), at::kFloat);
    EXPECT_TRUE(at::equal(
        loss,
        quantization_loss(weight.to(at::kDouble), dequantized.to(at::kDouble), hessian.to(at::kDouble)).to(at::kFloat)))
        << dtype;
  }
}

TEST(Loss, StridesAndThreadsDoNotMatter) {
  const at::Tensor weight = testing::normal({30, 200}, 10).mT();
  const at::Tensor dequantized = testing::normal({30, 200}, 11).mT();
  const at::Tensor hessian = testing::hessian_of_inputs(30, 60, 12);
  at::Tensor one;
  {
    const testing::ScopedThreads threads(1);
    one = quantization_loss(weight, dequantized, hessian);
  }
  const testing::ScopedThreads threads(2);
  EXPECT_TRUE(at::equal(quantization_loss(weight.contiguous(), dequantized.contiguous(), hessian.mT()), one));
}

TEST(Loss, OfNothingIsEmptyOrZero) {
  EXPECT_EQ(quantization_loss(at::empty({0, 3}), at::empty({0, 3}), at::empty({3, 3}).zero_()).numel(), 0);
  EXPECT_TRUE(quantization_loss(at::empty({2, 0}), at::empty({2, 0}), at::empty({0, 0})).eq(0).all().item<bool>());
}

}  // namespace
}  // namespace miniquant::algorithms
