#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>

#include "driver/safetensors.h"
#include "driver/session.h"
#include "driver/sha256.h"
#include "safetensors_bytes.h"
#include "temporary_folder.h"

namespace miniquant::driver {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::StartsWith;

class Session : public testing::Test {
 protected:
  ~Session() override { at::set_num_threads(threads_); }

  // Runs the program with a small layer and this test's folder, and keeps its output.
  int run(const std::vector<std::string>& arguments, bool progress = false) {
    std::vector<std::string> all = {"--output", output_};
    all.insert(all.end(), arguments.begin(), arguments.end());
    std::ostringstream out;
    std::ostringstream error;
    const int code = run_session("/some/where/gptq_toy", all, out, error, progress);
    out_ = out.str();
    error_ = error.str();
    return code;
  }

  int run_small(std::vector<std::string> arguments = {}, bool progress = false) {
    const std::vector<std::string> small = {"--rows",   "40", "--columns",      "96",
                                            "--tokens", "20", "--fresh-tokens", "50"};
    arguments.insert(arguments.begin(), small.begin(), small.end());
    return run(arguments, progress);
  }

  const TemporaryFolder folder_;
  const std::string output_ = (folder_.path() / "out").string();
  const int threads_ = at::get_num_threads();
  std::string out_;
  std::string error_;
};

TEST_F(Session, WritesBothFilesAndPrintsTheTable) {
  EXPECT_EQ(run_small(), 0);
  EXPECT_EQ(error_, "");
  EXPECT_THAT(out_, HasSubstr("calibration loss"));
  EXPECT_THAT(out_, HasSubstr("wrote " + output_ + "/results.json and " + output_ + "/manifest.json\n"));
  const json results = json::parse(folder_.read("out/results.json"));
  EXPECT_EQ(results["runs"].size(), 2U);
  EXPECT_EQ(results["runs"]["normal"]["row_loss_rtn"].size(), 40U);
  const json manifest = json::parse(folder_.read("out/manifest.json"));
  EXPECT_EQ(manifest["command"][0], "gptq_toy");
  EXPECT_EQ(manifest["outputs"]["results.json"], sha256(folder_.read("out/results.json")));
}

TEST_F(Session, TheSameCommandGivesTheSameResults) {
  ASSERT_EQ(run_small({"--threads", "1"}), 0);
  const std::string first = folder_.read("out/results.json");
  ASSERT_EQ(run_small({"--threads", "2"}), 0);
  EXPECT_EQ(folder_.read("out/results.json"), first);
  ASSERT_EQ(run_small({"--threads", "2", "--check", "--quiet"}), 0);
  EXPECT_EQ(folder_.read("out/results.json"), first);
  ASSERT_EQ(run_small({"--ridge", "auto", "--threads", "1"}), 0);
  const std::string automatic = folder_.read("out/results.json");
  ASSERT_EQ(run_small({"--ridge", "auto", "--threads", "2", "--check"}), 0);
  EXPECT_EQ(folder_.read("out/results.json"), automatic);
  EXPECT_NE(automatic, first);
  ASSERT_EQ(run_small({"--seed", "43"}), 0);
  EXPECT_NE(folder_.read("out/results.json"), first);
}

TEST_F(Session, QuietSaysNothing) {
  EXPECT_EQ(run_small({"--quiet"}, /*progress=*/true), 0);
  EXPECT_EQ(out_, "");
  EXPECT_EQ(error_, "");
  EXPECT_FALSE(folder_.read("out/results.json").empty());
}

TEST_F(Session, ProgressCountsToItsEndAndWipesItself) {
  EXPECT_EQ(run_small({"--check"}, /*progress=*/true), 0);
  EXPECT_THAT(error_, HasSubstr("0/18  normal: inputs"));
  EXPECT_THAT(error_, HasSubstr("17/18  cauchy: check"));
  EXPECT_THAT(error_, testing::EndsWith("\r\x1b[K"));
  EXPECT_THAT(out_, Not(HasSubstr("\x1b")));
}

TEST_F(Session, CheckIsPrinted) {
  EXPECT_EQ(run_small({"--check"}), 0);
  EXPECT_THAT(out_, HasSubstr("check, normal: passed"));
  EXPECT_THAT(out_, HasSubstr("check, cauchy: passed"));
}

TEST_F(Session, EveryQuantizationOptionReachesTheOperators) {
  ASSERT_EQ(run_small(), 0);
  const json plain = json::parse(folder_.read("out/results.json"))["runs"]["normal"];
  for (const std::vector<std::string>& option : std::vector<std::vector<std::string>>{{"--bits", "3"},
                                                                                      {"--group-size", "-1"},
                                                                                      {"--asymmetric"},
                                                                                      {"--ridge", "0.5"},
                                                                                      {"--ridge", "auto"},
                                                                                      {"--preset", "fast"},
                                                                                      {"--preset", "best"},
                                                                                      {"--column-order", "activation"},
                                                                                      {"--column-order", "group"},
                                                                                      {"--scale-method", "mse"},
                                                                                      {"--scale-method", "hessian"},
                                                                                      {"--full-range"},
                                                                                      {"--refine", "1"},
                                                                                      {"--group-scales", "dynamic"}}) {
    ASSERT_EQ(run_small(option), 0) << option[0];
    EXPECT_NE(json::parse(folder_.read("out/results.json"))["runs"]["normal"]["codes_sha256_gptq"],
              plain["codes_sha256_gptq"])
        << option[0];
  }
  ASSERT_EQ(run_small({"--block-size", "7"}), 0);
  EXPECT_EQ(json::parse(folder_.read("out/results.json"))["runs"]["normal"]["codes_sha256_gptq"],
            plain["codes_sha256_gptq"]);
}

// Options that all schemes share change RTN; the preset and the options that change the preset do not.
TEST_F(Session, PresetsLeaveRtnAndBestAlone) {
  const auto codes = [&](const char* scheme) {
    return json::parse(folder_.read("out/results.json"))["runs"]["normal"][std::string("codes_sha256_") + scheme];
  };
  ASSERT_EQ(run_small(), 0);
  const json rtn = codes("rtn");
  const json best = codes("best");
  EXPECT_NE(codes("gptq"), best);
  ASSERT_EQ(run_small({"--preset", "fast", "--refine", "2"}), 0);
  EXPECT_EQ(codes("rtn"), rtn);
  EXPECT_EQ(codes("best"), best);
  ASSERT_EQ(run_small({"--preset", "best"}), 0);
  EXPECT_EQ(codes("rtn"), rtn);
  EXPECT_EQ(codes("best"), best);
  EXPECT_EQ(codes("gptq"), best);
  ASSERT_EQ(run_small({"--preset", "best", "--asymmetric"}), 0);
  EXPECT_NE(codes("rtn"), rtn);
  EXPECT_NE(codes("best"), best);
  EXPECT_EQ(codes("gptq"), codes("best"));
}

TEST_F(Session, SavesTheLayer) {
  const std::filesystem::path path = folder_.path() / "layers" / "fc.safetensors";
  EXPECT_EQ(run_small({"--distribution", "cauchy", "--preset", "best", "--save", path.string()}), 0) << error_;
  EXPECT_THAT(
      out_, HasSubstr("wrote " + path.string() + ", " + output_ + "/results.json and " + output_ + "/manifest.json\n"));
  const json results = json::parse(folder_.read("out/results.json"));
  const std::string saved = folder_.read("layers/fc.safetensors");
  EXPECT_EQ(json::parse(folder_.read("out/manifest.json"))["outputs"]["fc.safetensors"], sha256(saved));
  const SafetensorsFile file(path);
  const SafetensorsFile::Entry& codes = file.find("codes").second;
  EXPECT_EQ(codes.shape, (std::vector<uint64_t>{40, 96}));
  EXPECT_EQ(results["runs"]["cauchy"]["codes_sha256_gptq"],
            sha256(std::string_view(saved).substr(codes.begin, codes.end - codes.begin)));
  EXPECT_EQ(file.find("scales").second.shape, (std::vector<uint64_t>{40, 2}));
}

TEST_F(Session, WhereALayerCannotBeSavedIsSeenBeforeAnyWork) {
  EXPECT_EQ(run_small({"--distribution", "normal", "--save", folder_.path().string()}), 2);
  EXPECT_EQ(error_, "gptq_toy: --save: expected a file, but " + folder_.path().string() + " is a folder\n");
  EXPECT_EQ(run_small({"--distribution", "normal", "--save", output_ + "/../out/results.json"}), 2);
  EXPECT_THAT(error_, StartsWith("gptq_toy: --save: expected another name than results.json and manifest.json, but "));
  EXPECT_EQ(run_small({"--save", (folder_.path() / "f").string()}), 2);
  EXPECT_THAT(folder_.names(), IsEmpty());
  const std::string file = folder_.write("file", "kept").string();
  EXPECT_EQ(run_small({"--distribution", "normal", "--save", file + "/layer"}), 2);
  EXPECT_EQ(error_, "gptq_toy: --save: expected a folder, but " + file + " is a file\n");
}

TEST_F(Session, InputsAndRidgesOutOfRangeEndWithTwo) {
  EXPECT_EQ(run_small({"--ridge", "1e40"}), 2);
  EXPECT_THAT(error_, StartsWith("gptq_toy: --ridge: expected at most "));
  const std::string w = folder_.write("w", one_tensor_file("fc", "[2,3]", {1, 2, 3, 4, 5, 6})).string();
  const std::string large = folder_.write("x", one_tensor_file("x", "[2,3]", {1, 2, 1e30F, 3, 4, 5})).string();
  EXPECT_EQ(run({"--weights", w, "--inputs", large}), 2);
  EXPECT_THAT(error_, StartsWith("gptq_toy: --inputs: x: tensor 'x': the squares of the inputs are summed in float32"));
  const std::string zeros = folder_.write("y", one_tensor_file("x", "[2,3]", {0, 0, 0, 0, 0, 0})).string();
  EXPECT_EQ(run({"--weights", w, "--inputs", zeros, "--ridge", "auto"}), 2);
  EXPECT_THAT(error_, StartsWith("gptq_toy: --inputs: y: tensor 'x': expected a value other than 0 for --ridge auto"));
  EXPECT_FALSE(std::filesystem::exists(output_));
}

TEST_F(Session, HelpAndVersionWriteNothing) {
  EXPECT_EQ(run({"--help"}), 0);
  EXPECT_THAT(out_, HasSubstr("Examples:"));
  EXPECT_EQ(run({"--version"}), 0);
  EXPECT_THAT(out_, StartsWith("gptq_toy "));
  EXPECT_THAT(folder_.names(), IsEmpty());
}

TEST_F(Session, BadInputEndsWithTwoAndWritesNothing) {
  EXPECT_EQ(run({"--bits", "9"}), 2);
  EXPECT_EQ(error_, "gptq_toy: --bits: expected an integer from 2 to 8, but got '9'\n");
  EXPECT_EQ(out_, "");
  EXPECT_EQ(run({"--weights", "/none/w.safetensors", "--inputs", "x"}), 2);
  EXPECT_EQ(error_, "gptq_toy: /none/w.safetensors: cannot be opened: No such file or directory\n");
  EXPECT_THAT(folder_.names(), IsEmpty());
}

TEST_F(Session, AFileForAFolderIsSeenBeforeAnyWork) {
  std::ostringstream out;
  std::ostringstream error;
  const std::string file = folder_.write("file", "kept").string();
  EXPECT_EQ(run_session("gptq_toy", {"--output", file}, out, error, false), 2);
  EXPECT_EQ(error.str(), "gptq_toy: --output: expected a folder, but " + file + " is a file\n");
  EXPECT_EQ(folder_.read("file"), "kept");
}

// With fewer tokens than columns and no ridge, H is singular.
TEST_F(Session, AHessianThatIsNotPositiveDefiniteEndsWithOne) {
  EXPECT_EQ(run_small({"--ridge", "0"}), 1);
  EXPECT_THAT(error_, StartsWith("gptq_toy: "));
  EXPECT_THAT(error_, HasSubstr("ridge"));
  EXPECT_THAT(error_, Not(HasSubstr("frame #")));
  EXPECT_THAT(folder_.names(), IsEmpty());
}

TEST_F(Session, WhatCannotBeWrittenIsShownAllTheSame) {
  std::filesystem::create_directories(folder_.path() / "out" / "manifest.json");
  EXPECT_EQ(run_small(), 1);
  EXPECT_THAT(out_, HasSubstr("calibration loss"));
  EXPECT_THAT(out_, Not(HasSubstr("wrote")));
  EXPECT_THAT(error_, HasSubstr("manifest.json"));
  EXPECT_FALSE(std::filesystem::exists(folder_.path() / "out" / "results.json"));
}

TEST_F(Session, ALayerFromFiles) {
  std::vector<float> weight;
  std::vector<float> inputs;
  for (int i = 0; i < 8 * 16; ++i) weight.push_back(static_cast<float>((i * 37) % 101 - 50) / 100.0F);
  for (int i = 0; i < 64 * 16; ++i) inputs.push_back(static_cast<float>((i * 53) % 97 - 48) / 50.0F);
  const std::string w = folder_.write("w", one_tensor_file("fc", "[8,16]", weight)).string();
  const std::string x = folder_.write("x", one_tensor_file("x", "[4,16,16]", inputs)).string();
  EXPECT_EQ(run({"--weights", w, "--inputs", x, "--group-size", "8"}), 0) << error_;
  const json results = json::parse(folder_.read("out/results.json"));
  EXPECT_EQ(results["setup"]["tokens"], 64);
  EXPECT_EQ(results["setup"]["fresh_tokens"], 0);
  EXPECT_EQ(results["setup"]["weight_source"]["tensor"], "fc");
  EXPECT_LE(results["runs"]["file"]["loss_ratio"], 1.0);
  EXPECT_TRUE(results["runs"]["file"]["fresh_loss_gptq"].is_null());
  EXPECT_EQ(run({"--weights", w, "--inputs", x, "--group-size", "8", "--ridge", "auto", "--check"}), 0) << error_;
  const json automatic = json::parse(folder_.read("out/results.json"));
  EXPECT_EQ(automatic["setup"]["ridge"], "auto");
  EXPECT_EQ(automatic["runs"]["file"]["ridge"], automatic["runs"]["file"]["ridge_choice"]["chosen"]);
  EXPECT_EQ(automatic["runs"]["file"]["ridge_choice"]["half_tokens"], json({32, 32}));
  EXPECT_THAT(out_, HasSubstr("ridge of 'file': "));
  EXPECT_THAT(out_, HasSubstr("check, file: passed"));
}

}  // namespace
}  // namespace miniquant::driver
