#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "driver/error.h"
#include "driver/problem.h"
#include "driver/sha256.h"
#include "safetensors_bytes.h"
#include "temporary_folder.h"

namespace miniquant::driver {
namespace {

using testing::HasSubstr;

// The numbers are those of the default generator with the same seed, in the lab's order.
TEST(Problem, DrawsWhatTheDefaultGeneratorGives) {
  SyntheticSource source{.rows = 6, .columns = 40, .tokens = 9, .fresh_tokens = 5, .seed = 7};
  at::manual_seed(7);
  const at::Tensor weight = at::randn({6, 40}) * 0.02;
  const at::Tensor inputs = at::randn({40, 9});
  const at::Tensor fresh = at::randn({40, 5});
  const Problem normal = draw_problem(source, Distribution::kNormal);
  EXPECT_EQ(normal.name, "normal");
  EXPECT_TRUE(at::equal(normal.weight, weight));
  EXPECT_TRUE(at::equal(normal.inputs, inputs.t()));
  EXPECT_TRUE(at::equal(normal.fresh_inputs.value(), fresh.t()));
  EXPECT_EQ(normal.input_origin.sha256, sha256(inputs.const_data_ptr(), inputs.nbytes()));
  EXPECT_EQ(normal.input_origin.shape, (std::vector<int64_t>{40, 9}));

  at::manual_seed(7);
  static_cast<void>(at::randn({6, 40}));
  const at::Tensor heavy = at::empty({40, 9}).cauchy_();
  const at::Tensor heavy_fresh = at::empty({40, 5}).cauchy_();
  const Problem cauchy = draw_problem(source, Distribution::kCauchy);
  EXPECT_EQ(cauchy.name, "cauchy");
  EXPECT_TRUE(at::equal(cauchy.weight, weight));
  EXPECT_TRUE(at::equal(cauchy.inputs, heavy.t()));
  EXPECT_TRUE(at::equal(cauchy.fresh_inputs.value(), heavy_fresh.t()));
}

TEST(Problem, LeavesTheDefaultGeneratorAlone) {
  at::manual_seed(1);
  const at::Tensor expected = at::randn({20});
  at::manual_seed(1);
  static_cast<void>(draw_problem({.rows = 3, .columns = 3, .tokens = 3, .fresh_tokens = 0}, Distribution::kNormal));
  EXPECT_TRUE(at::equal(at::randn({20}), expected));
}

TEST(Problem, FreshInputsMayBeLeftOut) {
  const SyntheticSource source{.rows = 3, .columns = 4, .tokens = 2, .fresh_tokens = 0};
  const Problem problem = draw_problem(source, Distribution::kNormal);
  EXPECT_FALSE(problem.fresh_inputs.has_value());
  EXPECT_FALSE(problem.fresh_input_origin.has_value());
}

class ProblemFromFiles : public testing::Test {
 protected:
  FileSource source(const std::string& weight_shape, const std::string& input_shape, std::size_t weights,
                    std::size_t inputs) {
    FileSource files;
    files.weights = folder_.write("w.safetensors", one_tensor_file("fc.weight", weight_shape, counted(weights)));
    files.inputs = folder_.write("x.safetensors", one_tensor_file("tokens", input_shape, counted(inputs)));
    return files;
  }

  static std::vector<float> counted(std::size_t count) {
    std::vector<float> values;
    for (std::size_t i = 0; i < count; ++i) values.push_back(static_cast<float>(i));
    return values;
  }

  static std::string error_of(const FileSource& source) {
    try {
      static_cast<void>(load_problem(source));
    } catch (const InputError& error) {
      return error.what();
    }
    return "no error";
  }

  TemporaryFolder folder_;
};

TEST_F(ProblemFromFiles, LeadingDimensionsAreTokens) {
  FileSource files = source("[2,3]", "[2,2,3]", 6, 12);
  files.fresh_inputs = folder_.write("f.safetensors", one_tensor_file("other", "[3]", {7, 8, 9}));
  const Problem problem = load_problem(files);
  EXPECT_EQ(problem.name, "file");
  EXPECT_TRUE(at::equal(problem.weight, at::tensor({0.0F, 1.0F, 2.0F, 3.0F, 4.0F, 5.0F}).view({2, 3})));
  EXPECT_EQ(problem.inputs.sizes(), at::IntArrayRef({4, 3}));
  EXPECT_EQ(problem.inputs[3][2].item<float>(), 11.0F);
  EXPECT_TRUE(at::equal(problem.fresh_inputs.value(), at::tensor({7.0F, 8.0F, 9.0F}).view({1, 3})));
  EXPECT_EQ(problem.weight_origin.file, "w.safetensors");
  EXPECT_EQ(problem.weight_origin.tensor, "fc.weight");
  EXPECT_EQ(problem.weight_origin.dtype, "F32");
  EXPECT_EQ(problem.weight_origin.sha256, sha256(bytes_of(counted(6))));
  EXPECT_EQ(problem.fresh_input_origin.value().tensor, "other");
}

TEST_F(ProblemFromFiles, AFreshFileWithSeveralTensorsIsAskedForTheInputsName) {
  FileSource files = source("[2,3]", "[4,3]", 6, 12);
  const std::string header = R"({"tokens":{"dtype":"F32","shape":[1,3],"data_offsets":[0,12]},)"
                             R"("mask":{"dtype":"F32","shape":[1],"data_offsets":[12,16]}})";
  files.fresh_inputs = folder_.write("f", safetensors_bytes(header, bytes_of(counted(4))));
  EXPECT_EQ(load_problem(files).fresh_input_origin.value().tensor, "tokens");
  files.fresh_input_tensor = "mask";
  EXPECT_THAT(error_of(files), HasSubstr("tensor 'mask': expected shape [..., 3]"));
}

TEST_F(ProblemFromFiles, BadTensorsAreNamed) {
  const std::string weights = "--weights: ";
  const std::string inputs = "--inputs: ";
  const std::string w = (folder_.path() / "w.safetensors").string();
  const std::string x = (folder_.path() / "x.safetensors").string();
  EXPECT_EQ(error_of(source("[6]", "[4,3]", 6, 12)),
            weights + w + ": tensor 'fc.weight': expected a weight [N, K] with N, K >= 1, but got shape [6]");
  EXPECT_THAT(error_of(source("[1,2,3]", "[4,3]", 6, 12)), HasSubstr("but got shape [1, 2, 3]"));
  EXPECT_THAT(error_of(source("[0,3]", "[4,3]", 0, 12)), HasSubstr("but got shape [0, 3]"));
  EXPECT_EQ(
      error_of(source("[2,3]", "[3,4]", 6, 12)),
      inputs + x + ": tensor 'tokens': expected shape [..., 3], the weight's input features last, but got [3, 4]");
  EXPECT_THAT(error_of(source("[2,3]", "[]", 6, 1)), HasSubstr("expected shape [..., 3]"));
  EXPECT_THAT(error_of(source("[2,3]", "[0,3]", 6, 0)), HasSubstr("expected at least one token, but got shape [0, 3]"));

  // More dimensions than torch's operators accept.
  std::string many = "[1";
  for (int i = 0; i < 65; ++i) many += ",1";
  EXPECT_EQ(error_of(source(many + ",6]", "[4,3]", 6, 12)),
            weights + w + ": tensor 'fc.weight': expected a weight [N, K] with N, K >= 1, but got shape " +
                "[1, 1, 1, 1, 1, 1, 1, 1, ...] of 67 dimensions");
  EXPECT_THAT(error_of(source("[2,3]", many + ",4]", 6, 4)),
              HasSubstr("tensor 'tokens': expected shape [..., 3], the weight's input features last, but got [1, "));
  EXPECT_EQ(load_problem(source("[2,3]", many + ",3]", 6, 3)).inputs.sizes(), at::IntArrayRef({1, 3}));

  FileSource files = source("[2,3]", "[4,3]", 6, 12);
  files.tensor = "fc.wight";
  EXPECT_EQ(error_of(files), w + ": has no tensor 'fc.wight'; it has 'fc.weight'");

  files = source("[2,3]", "[4,3]", 6, 12);
  std::vector<float> values = counted(12);
  values[5] = std::numeric_limits<float>::quiet_NaN();
  values[6] = std::numeric_limits<float>::infinity();
  files.inputs = folder_.write("x.safetensors", one_tensor_file("tokens", "[4,3]", values));
  EXPECT_EQ(error_of(files), inputs + x + ": tensor 'tokens': expected finite values, but 2 of 12 are not");
}

}  // namespace
}  // namespace miniquant::driver
