#include <ATen/ops/equal.h>
#include <gtest/gtest.h>
#include <miniquant/miniquant.h>

#include <vector>

#include "ops/operators.h"
#include "tensor_testing.h"

namespace miniquant {
namespace {

TEST(Api, DefaultsAreThoseOfTheSchema) {
  const auto schema = testing::find_operator("gptq").schema();
  const auto default_of = [&](const char* name) {
    return *schema.arguments()[*schema.argumentIndexWithName(name)].default_value();
  };
  const GptqOptions options;
  EXPECT_EQ(options.bits, default_of("bits").toInt());
  EXPECT_EQ(options.group_size, default_of("group_size").toInt());
  EXPECT_EQ(options.symmetric, default_of("symmetric").toBool());
  EXPECT_EQ(options.ridge, default_of("ridge").toDouble());
  EXPECT_EQ(options.block_size, default_of("block_size").toInt());
  EXPECT_EQ(options.group_scales == GroupScales::kStatic, default_of("group_scales").toStringRef() == "static");
  EXPECT_EQ(options.column_order == ColumnOrder::kNatural, default_of("column_order").toStringRef() == "natural");
  EXPECT_FALSE(options.scales.has_value());
  EXPECT_FALSE(options.zero_points.has_value());
  EXPECT_EQ(options.full_range, default_of("full_range").toBool());
  EXPECT_EQ(name_of(options.scale_method), default_of("scale_method").toStringRef());
  EXPECT_EQ(options.scale_dtype.has_value(), !default_of("scale_dtype").isNone());
  EXPECT_EQ(options.refine, default_of("refine").toInt());
  EXPECT_EQ(options.beam_scales, default_of("beam_scales").toInt());
}

// Each option changes the result as the same option does through the dispatcher.
TEST(Api, EveryOptionReachesTheOperator) {
  const at::Tensor weight = testing::normal({5, 48}, 1);
  const at::Tensor hessian = testing::hessian_of_inputs(48, 100, 2);
  GptqOptions base;
  base.group_size = 16;
  const GptqResult plain = gptq(weight, hessian, base);
  std::vector<GptqOptions> changed(8, base);
  changed[0].bits = 3;
  changed[1].group_size = 8;
  changed[2].symmetric = false;
  changed[3].ridge = 1.0;
  changed[4].group_scales = GroupScales::kDynamic;
  changed[5].column_order = ColumnOrder::kActivation;
  changed[6].full_range = true;
  changed[7].scale_dtype = at::kBFloat16;
  for (size_t i = 0; i < changed.size(); ++i) {
    for (const testing::NamedAlgorithm& form : testing::kForms) {
      const GptqResult result = form.run(weight, hessian, changed[i]);
      EXPECT_GT(testing::differences(result.codes, plain.codes), 0) << form.name << ", option " << i;
      const GptqResult dispatched = testing::call_gptq(
          form.name, weight, hessian, changed[i].group_scales == GroupScales::kDynamic ? "dynamic" : "static",
          changed[i].column_order == ColumnOrder::kActivation ? "activation" : "natural", changed[i]);
      EXPECT_TRUE(at::equal(result.codes, dispatched.codes)) << form.name << ", option " << i;
      EXPECT_TRUE(at::equal(result.row_loss, dispatched.row_loss)) << form.name << ", option " << i;
    }
  }
  GridOptions grid;
  grid.bits = 3;
  grid.group_size = 16;
  grid.symmetric = false;
  const QuantizedWeight nearest = rtn(weight, grid);
  EXPECT_EQ(nearest.codes.min().item<int>(), -4);
  EXPECT_EQ(nearest.codes.max().item<int>(), 3);
  grid.scales = nearest.scales * 2;
  grid.zero_points = nearest.zero_points;
  EXPECT_TRUE(at::equal(rtn(weight, grid).scales, nearest.scales * 2));
}

TEST(Api, PackedCodesComeBack) {
  const QuantizedWeight quantized = rtn(testing::normal({5, 33}, 3));
  EXPECT_TRUE(at::equal(unpack_int4(pack_int4(quantized.codes), 33), quantized.codes));
  EXPECT_TRUE(at::equal(pack(quantized.codes, 4), pack_int4(quantized.codes)));
  EXPECT_TRUE(at::equal(unpack(pack(quantized.codes, 5), 5, 33), quantized.codes));
}

TEST(Api, ResultsKnowTheirGrid) {
  const at::Tensor weight = testing::normal({5, 33}, 3, at::kBFloat16);
  const at::Tensor hessian = testing::hessian_of_inputs(33, 70, 2);
  GptqOptions options;
  options.bits = 8;
  options.group_size = 10;
  options.symmetric = false;
  for (const testing::NamedAlgorithm& form : testing::kForms) {
    const GptqResult result = form.run(weight, hessian, options);
    EXPECT_EQ(result.bits, 8);
    EXPECT_EQ(result.group_size, 10);
    EXPECT_FALSE(result.symmetric);
    EXPECT_FALSE(result.full_range);
    EXPECT_TRUE(
        at::equal(dequantize(result), dequantize(result.codes, result.scales, result.zero_points, options.group_size)));
    const at::Tensor exact = dequantize(result, at::kFloat);
    EXPECT_EQ(exact.scalar_type(), at::kFloat);
    EXPECT_TRUE(at::equal(exact.to(at::kBFloat16), dequantize(result)));
    EXPECT_TRUE(at::equal(quantization_loss(weight, result, hessian), quantization_loss(weight, exact, hessian)));
    EXPECT_FALSE(
        at::equal(quantization_loss(weight, dequantize(result), hessian), quantization_loss(weight, exact, hessian)));
  }
  GridOptions grid;
  grid.bits = 3;
  grid.full_range = true;
  const QuantizedWeight nearest = rtn(weight, grid);
  EXPECT_EQ(nearest.bits, 3);
  EXPECT_TRUE(nearest.full_range);
}

}  // namespace
}  // namespace miniquant
