#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "algorithms/loss.h"
#include "algorithms/rtn.h"
#include "algorithms/superblocks.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

struct Case {
  SuperblockType type;
  int64_t lowest;
  int64_t highest;
};

constexpr Case kCases[] = {{SuperblockType::kQ2K, 1, 15},
                           {SuperblockType::kQ3K, -32, 31},
                           {SuperblockType::kQ4K, 1, 63},
                           {SuperblockType::kQ5K, 1, 63},
                           {SuperblockType::kQ6K, -128, 127}};

at::Tensor values_of(const SuperblockWeight& quantized) {
  return dequantize(quantized.codes, quantized.scales, quantized.zero_points, quantized.group_size, at::kDouble) -
         quantized.minima.to(at::kDouble).repeat_interleave(quantized.group_size, 1);
}

class Superblocks : public ::testing::TestWithParam<Case> {
 protected:
  [[nodiscard]] SuperblockType type() const { return GetParam().type; }

  /// Those of the preset "best".
  [[nodiscard]] static GptqOptions best() {
    GptqOptions options;
    options.ridge = 0.1;
    options.scale_method = ScaleMethod::kLoss;
    options.group_scales = GroupScales::kDynamic;
    options.column_order = ColumnOrder::kGroup;
    options.beam_scales = 2;
    options.refine = 2;
    return options;
  }

  /// Scales and minima are whole multiples, in range, of the steps that are stored.
  void expect_multiples(const SuperblockWeight& quantized) const {
    const QuantizationGrid grid = grid_of(type());
    const auto per_group = [&](const at::Tensor& steps) {
      return steps.to(at::kDouble).repeat_interleave(kSuperblockColumns / grid.group_size, 1);
    };
    const at::Tensor scales = quantized.scales.to(at::kDouble) / per_group(quantized.super_scales);
    EXPECT_TRUE(at::equal(scales, scales.round()));
    EXPECT_GE(scales.min().item<double>(), static_cast<double>(GetParam().lowest));
    EXPECT_LE(scales.max().item<double>(), static_cast<double>(GetParam().highest));
    EXPECT_FALSE(scales.eq(0).any().item<bool>());
    if (grid.symmetric) {
      EXPECT_FALSE(quantized.minima.any().item<bool>());
      return;
    }
    const at::Tensor steps = per_group(quantized.super_minima);
    const at::Tensor minima = (quantized.minima.to(at::kDouble) / steps).nan_to_num();
    EXPECT_TRUE(at::equal(minima * steps, quantized.minima.to(at::kDouble)));
    EXPECT_TRUE(at::equal(minima, minima.round()));
    EXPECT_GE(minima.min().item<double>(), 0);
    EXPECT_LE(minima.max().item<double>(), static_cast<double>(GetParam().highest));
  }

  const at::Tensor weight_ = testing::normal({37, 512}, 1);
  const at::Tensor hessian_ = testing::hessian_of_inputs(512, 900, 2);
};

TEST_P(Superblocks, EveryRoundOfRefinementKeepsMultiplesAndLowersTheLossThatItReports) {
  const at::Tensor damped = testing::damped(hessian_, 0.1);
  at::Tensor before;
  for (const int64_t rounds : {0, 1, 2, 4}) {
    GptqOptions options = best();
    options.refine = rounds;
    const SuperblockResult result = gptq_superblocks(weight_, hessian_, type(), options);
    expect_multiples(result);
    const at::Tensor loss = quantization_loss(weight_, values_of(result), damped);
    // Values are exact in float64; losses are sums of 512 * 512 products.
    EXPECT_LE((result.row_loss / loss - 1).abs().max().item<double>(), 1e-10) << rounds;
    if (before.defined()) {
      EXPECT_TRUE(loss.le(before * (1 + 1e-12)).all().item<bool>()) << rounds;
      EXPECT_LT(loss.sum().item<double>(), before.sum().item<double>()) << rounds;
    }
    before = loss;
  }
}

TEST_P(Superblocks, LoseFarLessThanRoundingToNearest) {
  const at::Tensor damped = testing::damped(hessian_, 0.1);
  const SuperblockWeight nearest = rtn_superblocks(weight_, type());
  expect_multiples(nearest);
  const double rounded = quantization_loss(weight_, values_of(nearest), damped).sum().item<double>();
  const double ours = gptq_superblocks(weight_, hessian_, type(), best()).row_loss.sum().item<double>();
  EXPECT_LT(ours, 0.6 * rounded);
}

TEST_P(Superblocks, AHessianWithoutCorrelationsGivesRoundingToNearest) {
  const SuperblockWeight nearest = rtn_superblocks(weight_, type());
  GptqOptions options;
  options.ridge = 0;
  const at::Tensor alike = at::eye(512, weight_.options()) * 3;
  const SuperblockResult result = gptq_superblocks(weight_, alike, type(), options);
  EXPECT_TRUE(at::equal(result.codes, nearest.codes));
  EXPECT_TRUE(at::equal(result.scales, nearest.scales));
  EXPECT_TRUE(at::equal(result.minima, nearest.minima));
}

TEST_P(Superblocks, ResultsDoNotDependOnThreads) {
  const testing::ScopedThreads one(1);
  const SuperblockResult alone = gptq_superblocks(weight_, hessian_, type(), best());
  const testing::ScopedThreads three(3);
  const SuperblockResult together = gptq_superblocks(weight_, hessian_, type(), best());
  EXPECT_TRUE(at::equal(alone.codes, together.codes));
  EXPECT_TRUE(at::equal(alone.scales, together.scales));
  EXPECT_TRUE(at::equal(alone.minima, together.minima));
  EXPECT_TRUE(at::equal(alone.row_loss, together.row_loss));
}

TEST_P(Superblocks, GroupsOfZerosStayZeroAndDoNotWidenTheSteps) {
  at::Tensor weight = weight_ * 0.01;
  weight.slice(1, 0, 64).zero_();
  weight.select(0, 3).zero_();
  const auto check = [&](const SuperblockWeight& result) {
    expect_multiples(result);
    EXPECT_FALSE(values_of(result).select(0, 3).any().item<bool>());
    // The groups beside those of zeros are far below the scale 1 of a group of zeros.
    EXPECT_LE(result.super_scales.slice(0, 0, 3).abs().max().item<double>(), 0.02);
  };
  check(rtn_superblocks(weight, type()));
  check(gptq_superblocks(weight, hessian_, type(), {}));
}

TEST_P(Superblocks, ARowTimesAPowerOfTwoHasTheSameCodes) {
  const SuperblockResult result = gptq_superblocks(weight_, hessian_, type(), best());
  const SuperblockResult larger = gptq_superblocks(weight_ * 256, hessian_, type(), best());
  EXPECT_TRUE(at::equal(larger.codes, result.codes));
  EXPECT_TRUE(at::equal(larger.scales, result.scales * 256));
  EXPECT_TRUE(at::equal(larger.minima, result.minima * 256));
}

TEST_P(Superblocks, StepsOfTinyAndHugeRowsStayInFloat16) {
  at::Tensor weight = weight_.clone();
  weight.select(0, 0).mul_(0x1p-100);
  weight.select(0, 1).mul_(0x1p40);
  const auto check = [&](const SuperblockWeight& result) {
    EXPECT_TRUE(result.super_scales.isfinite().all().item<bool>());
    EXPECT_TRUE(result.super_minima.isfinite().all().item<bool>());
    EXPECT_TRUE(result.scales.isfinite().all().item<bool>());
    EXPECT_FALSE(result.super_scales.eq(0).any().item<bool>());
  };
  check(rtn_superblocks(weight, type()));
  check(gptq_superblocks(weight, hessian_, type(), {}));
}

TEST_P(Superblocks, ColumnsOfDeadInputsAreRoundedToNearest) {
  at::Tensor hessian = hessian_.clone();
  hessian.select(0, 100).zero_();
  hessian.select(1, 100).zero_();
  at::Tensor weight = weight_.clone();
  weight.select(1, 100).mul_(4);  // among the largest of their groups
  const SuperblockResult result = gptq_superblocks(weight, hessian, type(), best());
  expect_multiples(result);
  const int64_t group = 100 / result.group_size;
  const at::Tensor scale = result.scales.select(1, group).to(at::kDouble).abs();
  const at::Tensor error = (values_of(result) - weight).select(1, 100).abs();
  // Half a step, and half of a multiple's step where a minimum was rounded.
  const at::Tensor room = scale * 0.5 + result.super_minima.select(1, 0).to(at::kDouble).abs();
  EXPECT_TRUE(error.le(room * 1.001).all().item<bool>());
}

std::string name_of_case(const ::testing::TestParamInfo<Case>& info) {
  const QuantizationGrid grid = grid_of(info.param.type);
  return "Q" + std::to_string(grid.bits) + "K";
}

INSTANTIATE_TEST_SUITE_P(Types, Superblocks, ::testing::ValuesIn(kCases), name_of_case);

}  // namespace
}  // namespace miniquant::algorithms
