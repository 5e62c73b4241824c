#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <miniquant/miniquant.h>

#include <vector>

#include "ops/operators.h"
#include "tensor_testing.h"

namespace miniquant {
namespace {

class Cpu : public ::testing::Test {
 protected:
  at::Tensor weight_ = testing::normal({6, 40}, 1);
  at::Tensor hessian_ = testing::hessian_of_inputs(40, 60, 2);
};

TEST_F(Cpu, ResultsNeverRequireAGradient) {
  const at::Tensor weight = weight_.clone().requires_grad_(true);
  const at::Tensor hessian = hessian_.clone().requires_grad_(true);
  ASSERT_TRUE(at::GradMode::is_enabled());
  const QuantizedWeight nearest = rtn(weight);
  const GptqResult result = gptq(weight, hessian);
  const GptqResult reference = gptq_reference(weight, hessian);
  const at::Tensor scales = nearest.scales.clone().requires_grad_(true);
  const at::Tensor dequantized = dequantize(nearest.codes, scales, nearest.zero_points, 64);
  for (const at::Tensor& output :
       {nearest.codes, nearest.scales, result.codes, result.scales, result.row_loss, reference.codes, reference.scales,
        reference.row_loss, dequantized, quantization_loss(weight, dequantized, hessian)}) {
    EXPECT_FALSE(output.requires_grad());
  }
  at::Tensor sum = at::zeros({40, 40}, at::kDouble);
  hessian_update_(sum, weight);
  EXPECT_FALSE(sum.requires_grad());
  EXPECT_TRUE(at::equal(result.codes, gptq(weight_, hessian_).codes));
}

TEST_F(Cpu, ArgumentsAreLeftAlone) {
  const at::Tensor weight = weight_.clone();
  const at::Tensor hessian = hessian_.clone();
  GptqOptions options;
  options.group_size = 16;
  options.symmetric = false;
  options.scales = testing::normal({6, 3}, 3).abs() + 0.1;
  options.zero_points = at::zeros({6, 3}, at::kChar);
  const at::Tensor scales = options.scales->clone();
  for (const auto& run : {gptq, gptq_reference}) {
    const GptqResult result = run(weight, hessian, options);
    result.scales.zero_();
    result.zero_points.fill_(5);
  }
  const QuantizedWeight nearest = rtn(weight, options);
  quantization_loss(weight, dequantize(nearest.codes, nearest.scales, nearest.zero_points, 16), hessian);
  EXPECT_TRUE(at::equal(weight, weight_));
  EXPECT_TRUE(at::equal(hessian, hessian_));
  EXPECT_TRUE(at::equal(*options.scales, scales)) << "results share memory with arguments";
  EXPECT_TRUE(options.zero_points->eq(0).all().item<bool>());
}

TEST_F(Cpu, HessianUpdateWritesItsArgumentAndReturnsIt) {
  at::Tensor hessian = at::zeros({40, 40}, at::kDouble);
  at::Tensor& returned = hessian_update_(hessian, weight_);
  EXPECT_EQ(&returned, &hessian);
  const at::Tensor expected = weight_.mT().matmul(weight_);
  EXPECT_LE((hessian - expected).abs().max().item<double>(), 1e-13);
}

// A Hessian whose two halves differ by rounding is replaced by their mean.
TEST_F(Cpu, SlightlyAsymmetricHessianIsAveraged) {
  const at::Tensor noise = testing::normal({40, 40}, 4) * 1e-9;
  const at::Tensor symmetric = hessian_ + (noise + noise.mT()) / 2;
  EXPECT_TRUE(at::equal(gptq(weight_, hessian_ + noise).codes, gptq(weight_, symmetric).codes));
}

TEST_F(Cpu, ChoicesReachTheAlgorithm) {
  GptqOptions options;
  options.group_size = 8;
  const at::Tensor natural = gptq(weight_, hessian_, options).codes;
  const at::Tensor activation = testing::call_gptq("gptq", weight_, hessian_, "static", "activation", options).codes;
  const at::Tensor dynamic = testing::call_gptq("gptq", weight_, hessian_, "dynamic", "natural", options).codes;
  EXPECT_GT(testing::differences(natural, activation), 0);
  EXPECT_GT(testing::differences(natural, dynamic), 0);
  EXPECT_TRUE(at::equal(natural, testing::call_gptq("gptq", weight_, hessian_, "static", "natural", options).codes));
}

TEST_F(Cpu, GptqBeatsRoundToNearestOnItsCalibration) {
  const QuantizedWeight nearest = rtn(weight_);
  const at::Tensor damped = hessian_ + at::eye(40, at::kDouble) * (0.01 * hessian_.diagonal().mean());
  const at::Tensor rounded = dequantize(nearest.codes, nearest.scales, nearest.zero_points, 64);
  EXPECT_LT(gptq(weight_, hessian_).row_loss.sum().item<double>(),
            0.7 * quantization_loss(weight_, rounded, damped).sum().item<double>());
}

}  // namespace
}  // namespace miniquant
