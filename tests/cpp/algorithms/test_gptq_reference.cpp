// algorithms/gptq_reference.cpp against the lab's own loop, and against that loop with each of the lab's pitfalls.

#include <ATen/ops/clamp.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linalg_cholesky.h>
#include <ATen/ops/linalg_inv.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/round.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "algorithms/gptq.h"
#include "algorithms/loss.h"
#include "algorithms/rtn.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

using testing::differences;

constexpr int64_t kGroupSize = 16;

enum class Slip {
  kNone,
  kWrongTriangle,  ///< Hinv[j, i] instead of Hinv[i, j]
  kLowerFactor,    ///< the lower factor of torch.linalg.cholesky(inv(H))
  kWrongSign,      ///< delta = dequant(q) - w
  kUpdateTooLate,  ///< updates applied after the rest of the row has been quantized
};

/// The lab's loop: w[j] -= delta_i * Hinv[i, j] / Hinv[i, i] for j > i, all rows at once.
at::Tensor textbook_codes(const at::Tensor& weight, const at::Tensor& damped, const at::Tensor& scales, Slip slip) {
  const int64_t columns = weight.size(1);
  const at::Tensor factor = at::linalg_cholesky(at::linalg_inv(damped), /*upper=*/slip != Slip::kLowerFactor);
  const at::Tensor original = weight.clone();
  at::Tensor w = weight.clone();
  at::Tensor codes = at::zeros(weight.sizes(), at::kChar);
  for (int64_t i = 0; i < columns; ++i) {
    const at::Tensor scale = scales.select(1, i / kGroupSize);
    const at::Tensor w_i = (slip == Slip::kUpdateTooLate ? original : w).select(1, i);
    const at::Tensor code = at::clamp(at::round(w_i / scale), -7, 7);
    const at::Tensor delta = slip == Slip::kWrongSign ? code * scale - w_i : w_i - code * scale;
    const at::Tensor row = slip == Slip::kWrongTriangle ? factor.select(1, i) : factor.select(0, i);
    w.slice(1, i + 1) -= at::outer(delta, row.slice(0, i + 1) / factor[i][i]);
    codes.select(1, i).copy_(code);
  }
  return codes;
}

class Textbook : public ::testing::Test {
 protected:
  Textbook() {
    options_.group_size = kGroupSize;
    nearest_ = algorithms::rtn(weight_, {{.group_size = kGroupSize}});
  }

  [[nodiscard]] double loss(const at::Tensor& codes) const {
    const at::Tensor values = dequantize(codes, nearest_.scales, nearest_.zero_points, kGroupSize);
    return quantization_loss(weight_, values, damped_).sum().item<double>();
  }

  GptqOptions options_;
  at::Tensor weight_ = testing::normal({32, 96}, 1).mul_(0.02);
  at::Tensor hessian_ = testing::hessian_of_inputs(96, 200, 2);
  at::Tensor damped_ = testing::damped(hessian_, 0.01);
  QuantizedWeight nearest_;
};

TEST_F(Textbook, LoopOfTheLabGivesTheCodesOfBothForms) {
  const at::Tensor codes = textbook_codes(weight_, damped_, nearest_.scales, Slip::kNone);
  EXPECT_EQ(differences(algorithms::gptq_reference(weight_, hessian_, options_).codes, codes), 0);
  EXPECT_EQ(differences(algorithms::gptq(weight_, hessian_, options_).codes, codes), 0);
  EXPECT_LT(loss(codes), 0.7 * loss(nearest_.codes));
}

// Each slip gives other codes, and a loss that misses the lab's limit, 0.7 times that of round to nearest.
TEST_F(Textbook, PitfallsOfTheLabAreSeen) {
  const at::Tensor codes = algorithms::gptq_reference(weight_, hessian_, options_).codes;
  for (const Slip slip : {Slip::kWrongTriangle, Slip::kLowerFactor, Slip::kWrongSign, Slip::kUpdateTooLate}) {
    const at::Tensor slipped = textbook_codes(weight_, damped_, nearest_.scales, slip);
    EXPECT_GT(differences(slipped, codes), codes.numel() / 100) << static_cast<int>(slip);
    EXPECT_GT(loss(slipped), 0.99 * loss(nearest_.codes)) << static_cast<int>(slip);
  }
}

TEST_F(Textbook, PitfallsThatMakeTheUpdateSilentGiveRoundToNearest) {
  for (const Slip slip : {Slip::kWrongTriangle, Slip::kLowerFactor, Slip::kUpdateTooLate}) {
    EXPECT_TRUE(at::equal(textbook_codes(weight_, damped_, nearest_.scales, slip), nearest_.codes))
        << static_cast<int>(slip);
  }
  EXPECT_GT(loss(textbook_codes(weight_, damped_, nearest_.scales, Slip::kWrongSign)), 1.5 * loss(nearest_.codes));
}

TEST_F(Textbook, BlockSizeDoesNotChangeACode) {
  for (const GroupScales group_scales : {GroupScales::kStatic, GroupScales::kDynamic}) {
    options_.group_scales = group_scales;
    options_.block_size = 96;
    const GptqResult expected = algorithms::gptq_reference(weight_, hessian_, options_);
    for (const int64_t block_size : {1, 2, 7, 10, 32, 97}) {
      options_.block_size = block_size;
      const GptqResult result = algorithms::gptq_reference(weight_, hessian_, options_);
      EXPECT_EQ(differences(result.codes, expected.codes), 0) << block_size;
      EXPECT_LE(((result.scales - expected.scales).abs() / expected.scales).max().item<double>(), 1e-12) << block_size;
    }
  }
}

TEST_F(Textbook, RowLossIsTheQuantizationLossUnderTheDampedHessian) {
  for (const ColumnOrder order : {ColumnOrder::kNatural, ColumnOrder::kActivation}) {
    options_.column_order = order;
    const GptqResult result = algorithms::gptq_reference(weight_, hessian_, options_);
    const at::Tensor values = dequantize(result.codes, result.scales, result.zero_points, kGroupSize);
    const at::Tensor expected = quantization_loss(weight_, values, damped_);
    EXPECT_LE(((result.row_loss - expected).abs() / expected).max().item<double>(), 1e-12);
  }
}

// Dynamic scales: the scale of a group is the largest magnitude of its weights after the updates of all earlier
// columns.
TEST_F(Textbook, DynamicScalesComeFromTheWeightsAsTheLoopLeavesThem) {
  options_.group_scales = GroupScales::kDynamic;
  const GptqResult result = algorithms::gptq_reference(weight_, hessian_, options_);
  const at::Tensor factor = at::linalg_cholesky(at::linalg_inv(damped_), /*upper=*/true);
  at::Tensor w = weight_.clone();
  for (int64_t i = 0; i < 96; ++i) {
    const int64_t group = i / kGroupSize;
    if (i % kGroupSize == 0) {
      const at::Tensor expected = w.slice(1, i, i + kGroupSize).abs().amax(1) / 7;
      EXPECT_LE(((result.scales.select(1, group) - expected).abs() / expected).max().item<double>(), 1e-12) << group;
    }
    const at::Tensor delta = w.select(1, i) - result.codes.select(1, i) * result.scales.select(1, group);
    w.slice(1, i + 1) -= at::outer(delta, factor.select(0, i).slice(0, i + 1) / factor[i][i]);
  }
}

TEST_F(Textbook, HalfPrecisionScalesAreRoundedToTheirStorageType) {
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    const GptqResult result = algorithms::gptq_reference(weight_.to(dtype), hessian_, options_);
    EXPECT_EQ(result.scales.scalar_type(), dtype);
    EXPECT_TRUE(at::equal(result.scales, algorithms::gptq(weight_.to(dtype), hessian_, options_).scales)) << dtype;
  }
}

}  // namespace
}  // namespace miniquant::algorithms
