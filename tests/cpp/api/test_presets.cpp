#include <gtest/gtest.h>
#include <miniquant/miniquant.h>

#include "tensor_testing.h"

namespace miniquant {
namespace {

double loss_of(Preset preset, const at::Tensor& weight, const at::Tensor& hessian) {
  return gptq(weight, hessian, options_of(preset)).row_loss.sum().item<double>();
}

TEST(Presets, EachHasALowerLossThanTheOneBefore) {
  const at::Tensor weight = testing::normal({64, 256}, 1);
  const at::Tensor hessian = testing::hessian_of_inputs(256, 400, 2);
  const double plain = loss_of(Preset::kPlain, weight, hessian);
  const double fast = loss_of(Preset::kFast, weight, hessian);
  const double best = loss_of(Preset::kBest, weight, hessian);
  EXPECT_LT(fast, 0.9 * plain);
  EXPECT_LT(best, 0.9 * fast);
}

TEST(Presets, PlainIsTheDefaults) {
  const at::Tensor weight = testing::normal({5, 128}, 1);
  const at::Tensor hessian = testing::hessian_of_inputs(128, 200, 2);
  EXPECT_TRUE(gptq(weight, hessian, options_of(Preset::kPlain)).codes.equal(gptq(weight, hessian).codes));
}

TEST(Presets, OfAnAsymmetricGridWork) {
  const at::Tensor weight = testing::normal({16, 128}, 1).abs();
  const at::Tensor hessian = testing::hessian_of_inputs(128, 200, 2);
  for (const Preset preset : {Preset::kPlain, Preset::kFast, Preset::kBest}) {
    const GptqOptions options = options_of(preset, /*symmetric=*/false);
    const GptqResult result = gptq(weight, hessian, options);
    EXPECT_FALSE(result.symmetric);
    // A weight of one sign uses only half the codes of a symmetric grid.
    EXPECT_LT(result.row_loss.sum().item<double>(), 0.5 * loss_of(preset, weight, hessian)) << name_of(preset);
  }
}

}  // namespace
}  // namespace miniquant
