#include <ATen/ops/diag.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "algorithms/column_order.h"
#include "algorithms/gptq.h"
#include "algorithms/loss.h"
#include "algorithms/rtn.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

using testing::differences;

GptqOptions options_of(int64_t bits, int64_t group_size, bool symmetric) {
  GptqOptions options;
  options.bits = bits;
  options.group_size = group_size;
  options.symmetric = symmetric;
  return options;
}

struct NamedAlgorithm {
  const char* name;
  GptqResult (*run)(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options);
};
constexpr NamedAlgorithm kForms[] = {{"gptq", gptq}, {"gptq_reference", gptq_reference}};

at::Tensor dequantized(const QuantizedWeight& quantized, int64_t group_size) {
  return dequantize(quantized.codes, quantized.scales, quantized.zero_points, group_size);
}

QuantizedWeight rounded(const at::Tensor& weight, const GptqOptions& options) {
  return algorithms::rtn(weight, options);
}

std::string describe(const GptqOptions& options) {
  return c10::str(options.bits, " bits, group size ", options.group_size, ", symmetric ", options.symmetric,
                  ", block size ", options.block_size,
                  options.group_scales == GroupScales::kDynamic ? ", dynamic" : ", static",
                  options.column_order == ColumnOrder::kActivation ? ", activation" : ", natural");
}

/// Options that reach every path: all bits and grids; groups of one column, of partly filled strips, as long as a
/// block, longer, not dividing it, and one per row; static and dynamic scales; both orders.
std::vector<GptqOptions> table_of_options() {
  std::vector<GptqOptions> table;
  for (int64_t bits = 2; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      table.push_back(options_of(bits, 64, symmetric));
    }
  }
  for (const int64_t group_size : {-1, 1, 5, 100, 200}) {
    for (const bool symmetric : {true, false}) {
      for (const int64_t block_size : {32, 128}) {
        GptqOptions options = options_of(4, group_size, symmetric);
        options.block_size = block_size;
        table.push_back(options);
        options.group_scales = GroupScales::kDynamic;
        table.push_back(options);
        options.group_scales = GroupScales::kStatic;
        options.column_order = ColumnOrder::kActivation;
        table.push_back(options);
      }
    }
  }
  return table;
}

/// The rounding error of a loss of 0 (a group of one weight is represented exactly): (K eps)^2 w H w, [N].
at::Tensor loss_of_rounding(const at::Tensor& weight, const at::Tensor& hessian, double eps) {
  const double relative = static_cast<double>(weight.size(1)) * eps;
  return (weight.matmul(hessian) * weight).sum(1).mul_(relative * relative);
}

// Code for code in float64. The two forms may decide a tie (a target halfway between two codes to the last bits)
// differently. The random weights here have none, so any difference is an error.
TEST(Gptq, AgreesWithTheTextbookFormCodeForCode) {
  const at::Tensor weight = testing::normal({20, 300}, 1);
  const at::Tensor hessian = testing::hessian_of_inputs(300, 200, 2);
  const at::Tensor nothing = loss_of_rounding(weight, hessian, std::numeric_limits<double>::epsilon());
  const testing::ScopedThreads threads(1);
  for (const GptqOptions& options : table_of_options()) {
    const GptqResult fast = algorithms::gptq(weight, hessian, options);
    const GptqResult textbook = algorithms::gptq_reference(weight, hessian, options);
    EXPECT_EQ(differences(fast.codes, textbook.codes), 0) << describe(options);
    EXPECT_EQ(differences(fast.zero_points, textbook.zero_points), 0) << describe(options);
    EXPECT_LE(((fast.scales - textbook.scales).abs() / textbook.scales).max().item<double>(), 1e-10)
        << describe(options);
    EXPECT_TRUE((fast.row_loss - textbook.row_loss).abs().le(textbook.row_loss * 1e-8 + nothing).all().item<bool>())
        << describe(options);
  }
}

TEST(Gptq, RowLossIsTheQuantizationLossUnderTheDampedHessian) {
  const at::Tensor weight = testing::normal({20, 300}, 3);
  const at::Tensor hessian = testing::hessian_of_inputs(300, 200, 4);
  const at::Tensor nothing = loss_of_rounding(weight, hessian, std::numeric_limits<double>::epsilon());
  const testing::ScopedThreads threads(1);
  for (const GptqOptions& options : table_of_options()) {
    const GptqResult result = algorithms::gptq(weight, hessian, options);
    const at::Tensor matrix = testing::damped(hessian, options.ridge);
    const at::Tensor loss = quantization_loss(weight, dequantized(result, options.group_size), matrix);
    EXPECT_TRUE((result.row_loss - loss).abs().le(loss * 1e-10 + nothing).all().item<bool>()) << describe(options);
  }
}

TEST(Gptq, Float32LossIsThatOfFloat64ToATenthOfAPercent) {
  const at::Tensor weight = testing::normal({200, 300}, 5, at::kFloat);
  const at::Tensor hessian = testing::hessian_of_inputs(300, 200, 6, at::kFloat);
  const double nothing = loss_of_rounding(weight, hessian, std::numeric_limits<float>::epsilon()).sum().item<double>();
  const testing::ScopedThreads threads(1);
  for (const GptqOptions& options : table_of_options()) {
    const double single = algorithms::gptq(weight, hessian, options).row_loss.sum().item<double>();
    const double twice = algorithms::gptq(weight.to(at::kDouble), hessian, options).row_loss.sum().item<double>();
    EXPECT_NEAR(single, twice, 1e-3 * twice + nothing) << describe(options);
  }
}

TEST(Gptq, BlockSizeDoesNotChangeACode) {
  const testing::ScopedThreads threads(1);
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    const at::Tensor weight = testing::normal({30, 300}, 7, dtype);
    const at::Tensor hessian = testing::hessian_of_inputs(300, 200, 8, dtype);
    for (const int64_t group_size : {-1, 5, 64, 200}) {
      for (const GroupScales group_scales : {GroupScales::kStatic, GroupScales::kDynamic}) {
        GptqOptions options = options_of(4, group_size, true);
        options.group_scales = group_scales;
        const GptqResult expected = algorithms::gptq(weight, hessian, options);
        for (const int64_t block_size : {1, 2, 7, 10, 32, 300, 301}) {
          options.block_size = block_size;
          const GptqResult result = algorithms::gptq(weight, hessian, options);
          EXPECT_EQ(differences(result.codes, expected.codes), 0) << describe(options);
          EXPECT_TRUE(at::equal(result.scales, expected.scales)) << describe(options);
        }
      }
    }
  }
}

TEST(Gptq, ThreadsDoNotChangeABit) {
  const at::Tensor weight = testing::normal({250, 300}, 9, at::kFloat);
  const at::Tensor hessian = testing::hessian_of_inputs(300, 200, 10, at::kFloat);
  for (const GroupScales group_scales : {GroupScales::kStatic, GroupScales::kDynamic}) {
    GptqOptions options;
    options.group_scales = group_scales;
    GptqResult one;
    {
      const testing::ScopedThreads threads(1);
      one = algorithms::gptq(weight, hessian, options);
    }
    const testing::ScopedThreads threads(2);
    const GptqResult two = algorithms::gptq(weight, hessian, options);
    EXPECT_TRUE(at::equal(one.codes, two.codes));
    EXPECT_TRUE(at::equal(one.scales, two.scales));
    EXPECT_TRUE(at::equal(one.row_loss, two.row_loss));
  }
}

TEST(Gptq, OfAMultipleOfTheIdentityIsRoundToNearest) {
  const at::Tensor weight = testing::normal({40, 130}, 11);
  for (const double factor : {1e-3, 1.0, 7.0}) {
    for (const bool symmetric : {true, false}) {
      const GptqOptions options = options_of(4, 32, symmetric);
      const GptqResult result = algorithms::gptq(weight, at::eye(130, at::kDouble) * factor, options);
      const QuantizedWeight nearest = rounded(weight, options);
      EXPECT_EQ(differences(result.codes, nearest.codes), 0) << factor;
      EXPECT_TRUE(at::equal(result.scales, nearest.scales)) << factor;
    }
  }
}

TEST(Gptq, StaticScalesAreThoseOfTheOriginalWeightsAndDynamicOnesAreNot) {
  const at::Tensor weight = testing::normal({10, 128}, 12);
  const at::Tensor hessian = testing::hessian_of_inputs(128, 200, 13);
  GptqOptions options = options_of(4, 32, true);
  const at::Tensor original = rounded(weight, options).scales;
  EXPECT_TRUE(at::equal(algorithms::gptq(weight, hessian, options).scales, original));
  options.column_order = ColumnOrder::kActivation;
  EXPECT_TRUE(at::equal(algorithms::gptq(weight, hessian, options).scales, original));
  options.column_order = ColumnOrder::kNatural;
  options.group_scales = GroupScales::kDynamic;
  const at::Tensor dynamic = algorithms::gptq(weight, hessian, options).scales;
  EXPECT_TRUE(at::equal(dynamic.select(1, 0), original.select(1, 0))) << "nothing is updated before the first group";
  EXPECT_EQ(differences(dynamic.slice(1, 1), original.slice(1, 1)), 30);
}

// With one group per row, activation order equals permuting W's columns and H by hand.
TEST(Gptq, ActivationOrderIsThePermutedProblem) {
  const at::Tensor weight = testing::normal({10, 90}, 14);
  const at::Tensor hessian = testing::hessian_of_inputs(90, 200, 15);
  GptqOptions options = options_of(4, -1, true);
  const at::Tensor order = order_of_columns(hessian, ColumnOrder::kActivation, 64);
  const GptqResult permuted = algorithms::gptq(
      weight.index_select(1, order), hessian.index_select(0, order).index_select(1, order).contiguous(), options);
  options.column_order = ColumnOrder::kActivation;
  EXPECT_EQ(differences(algorithms::gptq(weight, hessian, options).codes.index_select(1, order), permuted.codes), 0);
}

TEST(Gptq, GivenScalesAreUsedAndLeftAlone) {
  const at::Tensor weight = testing::normal({5, 40}, 16);
  const at::Tensor hessian = testing::hessian_of_inputs(40, 60, 17);
  GptqOptions options = options_of(4, 8, false);
  options.scales = testing::normal({5, 5}, 18).abs() + 0.1;
  options.zero_points = at::zeros({5, 5}, at::kChar).fill_(-3);
  const at::Tensor scales = options.scales->clone();
  const GptqResult fast = algorithms::gptq(weight, hessian, options);
  EXPECT_TRUE(at::equal(fast.scales, scales));
  EXPECT_TRUE(at::equal(*options.scales, scales));
  EXPECT_TRUE(fast.zero_points.eq(-3).all().item<bool>());
  EXPECT_EQ(differences(fast.codes, algorithms::gptq_reference(weight, hessian, options).codes), 0);
}

TEST(Gptq, HalfPrecisionIsFloat32WithStoredScales) {
  const at::Tensor hessian = testing::hessian_of_inputs(130, 200, 19, at::kFloat);
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    const at::Tensor weight = testing::normal({20, 130}, 20, dtype);
    GptqOptions options = options_of(4, 32, true);
    const GptqResult stored = algorithms::gptq(weight, hessian, options);
    EXPECT_EQ(stored.scales.scalar_type(), dtype);
    EXPECT_EQ(stored.row_loss.scalar_type(), at::kFloat);
    options.scales = stored.scales.to(at::kFloat);
    const GptqResult single = algorithms::gptq(weight.to(at::kFloat), hessian, options);
    EXPECT_TRUE(at::equal(stored.codes, single.codes)) << dtype;
    EXPECT_TRUE(at::equal(stored.row_loss, single.row_loss)) << dtype;
  }
}

TEST(Gptq, DeadInputsAreRoundedToNearestAndCostNothing) {
  const at::Tensor weight = testing::normal({6, 50}, 21);
  at::Tensor hessian = testing::hessian_of_inputs(50, 200, 22);
  const at::Tensor dead = at::tensor({0, 7, 49}, at::kLong);
  hessian.index_fill_(0, dead, 0).index_fill_(1, dead, 0);
  for (const double ridge : {0.0, 0.01}) {
    for (const ColumnOrder order : {ColumnOrder::kNatural, ColumnOrder::kActivation}) {
      GptqOptions options = options_of(4, 10, true);
      options.ridge = ridge;
      options.column_order = order;
      const GptqResult result = algorithms::gptq(weight, hessian, options);
      EXPECT_EQ(differences(result.codes.index_select(1, dead), rounded(weight, options).codes.index_select(1, dead)),
                0)
          << ridge;
      EXPECT_EQ(differences(result.codes, algorithms::gptq_reference(weight, hessian, options).codes), 0) << ridge;
      const at::Tensor loss = quantization_loss(weight, dequantized(result, 10), testing::damped(hessian, ridge));
      EXPECT_LE(((result.row_loss - loss).abs() / loss).max().item<double>(), 1e-10) << ridge;
    }
  }
  GptqOptions none = options_of(4, 10, true);
  const GptqResult all_dead = algorithms::gptq(weight, at::zeros({50, 50}, at::kDouble), none);
  EXPECT_EQ(differences(all_dead.codes, rounded(weight, none).codes), 0);
  EXPECT_TRUE(all_dead.row_loss.eq(0).all().item<bool>());
}

TEST(Gptq, AllZeroGroupsStayZero) {
  at::Tensor weight = testing::normal({4, 32}, 23);
  weight.slice(1, 8, 16).zero_();
  weight.select(0, 2).zero_();
  const at::Tensor hessian = testing::hessian_of_inputs(32, 60, 24);
  for (const bool symmetric : {true, false}) {
    const GptqOptions options = options_of(4, 8, symmetric);
    const GptqResult result = algorithms::gptq(weight, hessian, options);
    EXPECT_TRUE(result.codes.select(0, 2).eq(0).all().item<bool>());
    EXPECT_TRUE(result.scales.select(1, 1).eq(1).all().item<bool>());
    EXPECT_EQ(result.row_loss[2].item<double>(), 0.0);
    EXPECT_EQ(differences(result.codes, algorithms::gptq_reference(weight, hessian, options).codes), 0);
  }
}

TEST(Gptq, SmallestShapes) {
  for (const auto& [rows, columns] : {std::pair{1, 1}, {1, 70}, {70, 1}, {0, 5}, {3, 0}, {0, 0}}) {
    for (const GroupScales group_scales : {GroupScales::kStatic, GroupScales::kDynamic}) {
      for (const int64_t group_size : {-1, 64}) {
        const at::Tensor weight = testing::normal({rows, columns}, 25);
        const at::Tensor hessian =
            columns == 0 ? at::zeros({0, 0}, at::kDouble) : testing::hessian_of_inputs(columns, columns + 5, 26);
        GptqOptions options = options_of(4, group_size, true);
        options.group_scales = group_scales;
        const GptqResult result = algorithms::gptq(weight, hessian, options);
        const int64_t groups = columns == 0 ? 0 : (group_size == -1 ? 1 : (columns + 63) / 64);
        EXPECT_EQ(result.codes.sizes(), weight.sizes());
        EXPECT_EQ(result.scales.sizes(), (std::vector<int64_t>{rows, groups}));
        EXPECT_EQ(result.row_loss.sizes(), (std::vector<int64_t>{rows}));
        if (columns == 1) {
          EXPECT_EQ(differences(result.codes, rounded(weight, options).codes), 0);
        }
        EXPECT_EQ(differences(result.codes, algorithms::gptq_reference(weight, hessian, options).codes), 0);
      }
    }
  }
}

TEST(Gptq, StridesDoNotMatterAndArgumentsAreLeftAlone) {
  const at::Tensor weight = testing::normal({60, 20}, 27).mT();
  at::Tensor hessian = at::zeros({120, 120}, at::kDouble).slice(0, 0, 120, 2).slice(1, 0, 120, 2);
  hessian.copy_(testing::hessian_of_inputs(60, 90, 28));
  const at::Tensor weight_before = weight.clone();
  const at::Tensor hessian_before = hessian.clone();
  const GptqOptions options = options_of(4, 16, true);
  const GptqResult strided = algorithms::gptq(weight, hessian, options);
  const GptqResult contiguous = algorithms::gptq(weight.contiguous(), hessian.contiguous(), options);
  EXPECT_TRUE(at::equal(strided.codes, contiguous.codes));
  EXPECT_TRUE(at::equal(strided.row_loss, contiguous.row_loss));
  EXPECT_TRUE(at::equal(weight, weight_before));
  EXPECT_TRUE(at::equal(hessian, hessian_before));
}

TEST(Gptq, FewerTokensThanColumnsNeedTheRidge) {
  const at::Tensor weight = testing::normal({4, 100}, 29);
  const at::Tensor inputs = testing::normal({10, 100}, 30);
  const at::Tensor hessian = inputs.mT().matmul(inputs) / 10;
  GptqOptions options;
  EXPECT_EQ(differences(algorithms::gptq(weight, hessian, options).codes,
                        algorithms::gptq_reference(weight, hessian, options).codes),
            0);
}

TEST(Gptq, RefusesAHessianThatIsNotPositiveDefinite) {
  at::Tensor hessian = testing::hessian_of_inputs(40, 100, 31);
  hessian[17][17] = -hessian[17][17];
  const GptqOptions options;
  for (const NamedAlgorithm& algorithm : kForms) {
    const double added = options.ridge * hessian.diagonal().mean().item<double>();
    EXPECT_EQ(
        testing::message_of<c10::LinAlgError>([&] { algorithm.run(testing::normal({2, 40}, 32), hessian, options); }),
        c10::str(algorithm.name, ": expected hessian to be positive definite with ridge=0.01 (", added,
                 " added to its diagonal), but the leading minor of order 18 is not; try ridge=0.1"));
  }
}

/// The lab: W, X and fresh X from one generator seeded 42.
struct Lab {
  at::Tensor weight;
  at::Tensor hessian;
  at::Tensor fresh_hessian;
};

Lab make_lab(bool cauchy) {
  at::Generator generator = at::detail::createCPUGenerator(42);
  const at::Tensor weight = at::randn({768, 768}, generator) * 0.02;
  const auto draw = [&](int64_t tokens) {
    return cauchy ? at::empty({768, tokens}).cauchy_(0, 1, generator) : at::randn({768, tokens}, generator);
  };
  const at::Tensor inputs = draw(128);
  const at::Tensor fresh = draw(8192);
  return {weight, inputs.matmul(inputs.mT()) / 128, fresh.matmul(fresh.mT()) / 8192};
}

double total_loss(const at::Tensor& weight, const QuantizedWeight& quantized, const at::Tensor& hessian) {
  return quantization_loss(weight, dequantized(quantized, 64), hessian).sum(at::kDouble).item<double>();
}

// The figures of a float64 computation (docs/algorithm.md), to 1%.
TEST(GptqLab, LossesAndChangedCodesAreThoseMeasuredInFloat64) {
  struct Expected {
    bool cauchy;
    double loss_rtn, loss_gptq, changed_share;
  };
  for (const Expected& expected :
       {Expected{false, 2.766669, 0.303847, 0.16087}, Expected{true, 105127.2, 39725.6, 0.265}}) {
    const Lab lab = make_lab(expected.cauchy);
    const GptqOptions options;
    const QuantizedWeight nearest = rounded(lab.weight, options);
    const GptqResult result = algorithms::gptq(lab.weight, lab.hessian, options);
    const at::Tensor matrix = testing::damped(lab.hessian, options.ridge);
    EXPECT_NEAR(total_loss(lab.weight, nearest, matrix) / expected.loss_rtn, 1.0, 0.01);
    EXPECT_NEAR(total_loss(lab.weight, result, matrix) / expected.loss_gptq, 1.0, 0.01);
    EXPECT_NEAR(result.row_loss.sum(at::kDouble).item<double>() / expected.loss_gptq, 1.0, 0.01);
    const double share = static_cast<double>(differences(result.codes, nearest.codes)) / (768.0 * 768.0);
    EXPECT_NEAR(share / expected.changed_share, 1.0, 0.01);
  }
}

TEST(GptqLab, OnFreshInputsItLosesMoreThanRoundToNearest) {
  const Lab lab = make_lab(/*cauchy=*/false);
  const GptqOptions options;
  EXPECT_NEAR(total_loss(lab.weight, rounded(lab.weight, options), lab.fresh_hessian) / 2.7304, 1.0, 0.01);
  EXPECT_NEAR(total_loss(lab.weight, algorithms::gptq(lab.weight, lab.hessian, options), lab.fresh_hessian) / 5.1410,
              1.0, 0.01);
}

}  // namespace
}  // namespace miniquant::algorithms
