#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <miniquant/miniquant.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "driver/layer_file.h"
#include "driver/safetensors.h"
#include "temporary_folder.h"

namespace miniquant::driver {
namespace {

using nlohmann::json;

json header_of(const std::string& file) {
  uint64_t length = 0;
  std::memcpy(&length, file.data(), sizeof(length));
  return json::parse(file.substr(sizeof(length), length));
}

TEST(SafetensorsText, IsReadBack) {
  const TemporaryFolder folder;
  const at::Tensor wide = at::tensor({1.5, -2.0, 3.0}, at::kDouble);
  const at::Tensor narrow = at::tensor({1.0F, -0.5F}, at::kFloat).to(at::kBFloat16).view({1, 2});
  const at::Tensor transposed = at::tensor({1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 6.0F}).view({2, 3}).t();
  const std::string text =
      safetensors_text({{"narrow", narrow}, {"transposed", transposed}, {"wide", wide}}, {{"a", "b\"\n"}});
  const SafetensorsFile file(folder.write("f", text));
  EXPECT_TRUE(at::equal(file.read("wide"), wide));
  EXPECT_TRUE(at::equal(file.read("narrow"), narrow));
  EXPECT_EQ(file.read("narrow").scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::equal(file.read("transposed"), transposed));
  EXPECT_EQ(header_of(text)["__metadata__"], json({{"a", "b\"\n"}}));
  for (const auto& [name, entry] : file.entries()) EXPECT_EQ(entry.begin % 8, 0U) << name;
}

TEST(LayerFile, HoldsTheLayerAndItsOptions) {
  GptqOptions options = options_of(Preset::kFast);
  options.bits = 3;
  options.group_size = 32;
  options.ridge = 0.25;
  const at::Tensor inputs = at::randn({60, 40});
  HessianAccumulator accumulator(40);
  accumulator.update(inputs);
  const GptqResult quantized = gptq(at::randn({6, 40}), accumulator.hessian(), options);
  const TemporaryFolder folder;
  const std::string text = layer_file(quantized, options, "block.fc");
  const SafetensorsFile file(folder.write("layer", text));
  ASSERT_EQ(file.entries().size(), 4U);
  EXPECT_TRUE(at::equal(file.read("scales"), quantized.scales));
  EXPECT_TRUE(at::equal(file.read("row_loss"), quantized.row_loss));
  for (const auto& [name, tensor] :
       {std::pair("codes", quantized.codes), std::pair("zero_points", quantized.zero_points)}) {
    const SafetensorsFile::Entry& entry = file.find(name).second;
    EXPECT_EQ(entry.dtype, "I8");
    EXPECT_EQ(text.substr(entry.begin, entry.end - entry.begin),
              std::string(static_cast<const char*>(tensor.contiguous().const_data_ptr()), tensor.nbytes()));
  }
  const json metadata = header_of(text)["__metadata__"];
  EXPECT_EQ(metadata["format"], "miniquant.layer");
  EXPECT_EQ(metadata["version"], "1");
  EXPECT_EQ(metadata["bits"], "3");
  EXPECT_EQ(metadata["group_size"], "32");
  EXPECT_EQ(metadata["symmetric"], "true");
  EXPECT_EQ(metadata["full_range"], "true");
  EXPECT_EQ(metadata["layer"], "block.fc");
  const json expected = {{"bits", 3},
                         {"group_size", 32},
                         {"symmetric", true},
                         {"ridge", 0.25},
                         {"block_size", 128},
                         {"group_scales", "static"},
                         {"column_order", "activation"},
                         {"scale_method", "mse"},
                         {"full_range", true},
                         {"refine", 0},
                         {"beam_scales", 0}};
  EXPECT_EQ(json::parse(metadata["options"].get<std::string>()), expected);
}

}  // namespace
}  // namespace miniquant::driver
