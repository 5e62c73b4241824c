#include <ATen/core/enum_tag.h>
#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <utility>

#include "ops/operators.h"

namespace miniquant {
namespace {

constexpr const char* kGptqArguments =
    "(Tensor weight, Tensor hessian, *, int bits=4, int group_size=64, bool symmetric=True, Tensor? scales=None, "
    "Tensor? zero_points=None, bool full_range=False, str scale_method=\"absmax\", ScalarType? scale_dtype=None, "
    "float ridge=0.01, int block_size=128, str group_scales=\"static\", str column_order=\"natural\", int refine=0, "
    "int beam_scales=0) -> (Tensor codes, Tensor scales, Tensor zero_points, Tensor row_loss)";

constexpr std::pair<const char*, const char*> kSchemas[] = {
    {"rtn",
     "(Tensor weight, *, int bits=4, int group_size=64, bool symmetric=True, Tensor? scales=None, "
     "Tensor? zero_points=None, bool full_range=False, str scale_method=\"absmax\", ScalarType? scale_dtype=None) -> "
     "(Tensor codes, Tensor scales, Tensor zero_points)"},
    {"gptq", kGptqArguments},
    {"gptq_reference", kGptqArguments},
    {"rtn_superblocks",
     "(Tensor weight, str kind) -> (Tensor codes, Tensor scales, Tensor zero_points, Tensor minima, "
     "Tensor super_scales, Tensor super_minima)"},
    {"gptq_superblocks",
     "(Tensor weight, Tensor hessian, str kind, *, str scale_method=\"absmax\", float ridge=0.01, int block_size=128, "
     "str group_scales=\"static\", str column_order=\"natural\", int refine=0, int beam_scales=0) -> (Tensor codes, "
     "Tensor scales, Tensor zero_points, Tensor minima, Tensor super_scales, Tensor super_minima, Tensor row_loss)"},
    {"hessian_update_",
     "(Tensor(a!) hessian, Tensor inputs, *, Tensor? token_weights=None, str precision=\"full\") -> ()"},
    {"product_update_", "(Tensor(a!) sum, Tensor left, Tensor right) -> ()"},
    {"accumulator_update_",
     "(Tensor(a!) sums, Tensor(b!) tokens, Tensor(c!) weights, Tensor inputs, *, Tensor? mask=None, "
     "Tensor? token_weights=None, str precision=\"full\") -> ()"},
    {"accumulator_merge_",
     "(Tensor(a!) sums, Tensor(b!) tokens, Tensor(c!) weights, Tensor other_sums, Tensor other_tokens, "
     "Tensor other_weights) -> ()"},
    {"accumulator_hessian", "(Tensor sums, Tensor tokens, Tensor weights, *, int? half=None) -> Tensor"},
    {"accumulator_tokens",
     "(Tensor sums, Tensor tokens, Tensor weights, *, int? half=None) -> (Tensor tokens, Tensor effective_tokens)"},
    {"quantization_loss", "(Tensor weight, Tensor dequantized, Tensor hessian) -> Tensor"},
    {"dequantize",
     "(Tensor codes, Tensor scales, Tensor zero_points, int group_size, *, ScalarType? dtype=None) -> Tensor"},
    {"pack", "(Tensor codes, int bits) -> Tensor"},
    {"unpack", "(Tensor packed, int bits, SymInt columns) -> Tensor"},
    {"pack_int4", "(Tensor codes) -> Tensor"},
    {"unpack_int4", "(Tensor packed, SymInt columns) -> Tensor"},
};

TEST(Schema, IsWhatTheDocumentationSays) {
  for (const auto& [name, arguments] : kSchemas) {
    EXPECT_EQ(c10::toString(testing::find_operator(name).schema()), std::string("miniquant::") + name + arguments);
  }
}

TEST(Schema, EveryOperatorIsTaggedAsCompliantWithThePt2Compiler) {
  for (const auto& [name, arguments] : kSchemas) {
    EXPECT_TRUE(testing::find_operator(name).hasTag(at::Tag::pt2_compliant_tag)) << name;
  }
}

TEST(Schema, EveryOperatorServesRealAndMetaTensorsAndHasNoDerivative) {
  for (const auto& [name, arguments] : kSchemas) {
    const c10::OperatorHandle op = testing::find_operator(name);
    EXPECT_TRUE(op.hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd)) << name;
    EXPECT_TRUE(op.hasKernelForDispatchKey(c10::DispatchKey::Meta)) << name;
    EXPECT_TRUE(op.hasKernelForDispatchKey(c10::DispatchKey::Autograd)) << name;
  }
}

TEST(Schema, OnlyNamesThatEndInAnUnderscoreChangeAnArgument) {
  for (const auto& [name, arguments] : kSchemas) {
    EXPECT_EQ(testing::find_operator(name).schema().is_mutable(), std::string_view(name).back() == '_') << name;
  }
}

}  // namespace
}  // namespace miniquant
