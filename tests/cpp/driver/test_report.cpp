#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <miniquant/build.h>

#include <nlohmann/json.hpp>

#include "driver/report.h"
#include "driver/sha256.h"
#include "sample_runs.h"

namespace miniquant::driver {
namespace {

using nlohmann::json;

// results.json with the default options.
std::string results_of(const std::vector<Run>& runs) {
  const Options options;
  return results_json(options, runs);
}

std::string manifest_of(const std::vector<Run>& runs, const std::vector<std::string>& command,
                        const std::vector<OutputFile>& outputs) {
  const Options options;
  return manifest_json(options, runs, command, outputs);
}

TEST(Report, ResultsHoldTheFigures) {
  const json document = json::parse(results_of(sample_runs()));
  EXPECT_EQ(document["schema_version"], 3);
  EXPECT_EQ(document["setup"]["rows"], 3);
  EXPECT_EQ(document["setup"]["columns"], 200);
  EXPECT_EQ(document["setup"]["tokens"], 50);
  EXPECT_EQ(document["setup"]["fresh_tokens"], 70);
  EXPECT_EQ(document["setup"]["ridge"], 0.01);
  EXPECT_EQ(document["setup"]["seed"], 42);
  EXPECT_EQ(document["setup"]["weight_source"]["kind"], "random");
  const json& normal = document["runs"]["normal"];
  EXPECT_EQ(normal["loss_rtn"], 8.0);
  EXPECT_EQ(normal["loss_gptq"], 2.0);
  EXPECT_EQ(normal["loss_ratio"], 0.25);
  EXPECT_EQ(normal["fresh_loss_ratio"], 1.5);
  EXPECT_EQ(normal["loss_best"], 1.5);
  EXPECT_EQ(normal["best_ratio"], 0.75);
  EXPECT_EQ(normal["fresh_loss_best"], 4.5);
  EXPECT_EQ(normal["fresh_best_ratio"], 0.5);
  EXPECT_EQ(normal["row_loss_best"], json({0.25, 0.5, 0.75}));
  EXPECT_EQ(normal["worst_row_perplexity_proxy_best"], 1.125);
  EXPECT_EQ(normal["codes_sha256_best"], std::string(64, 'c'));
  EXPECT_EQ(normal["n_grid_changes"], 60);
  EXPECT_EQ(normal["grid_change_share"], 0.1);
  EXPECT_EQ(normal["row_loss_rtn"], json({1.0, 2.0, 5.0}));
  EXPECT_EQ(normal["row_loss_gptq"], json({0.5, 0.5, 1.0}));
  EXPECT_EQ(normal["worst_row_perplexity_proxy_gptq"], 1.25);
  EXPECT_EQ(normal["top_rows_absolute"][0], json({{"row", 2}, {"loss_rtn", 5.0}, {"loss_gptq", 1.0}, {"gain", 4.0}}));
  EXPECT_EQ(normal["codes_sha256_gptq"], std::string(64, 'b'));
  const json& cauchy = document["runs"]["cauchy"];
  EXPECT_TRUE(cauchy["loss_ratio"].is_null());
  EXPECT_TRUE(cauchy["fresh_loss_rtn"].is_null());
  EXPECT_TRUE(cauchy["fresh_loss_ratio"].is_null());
  EXPECT_TRUE(cauchy["best_ratio"].is_null());
  EXPECT_TRUE(cauchy["fresh_loss_best"].is_null());
  EXPECT_TRUE(cauchy["fresh_best_ratio"].is_null());
  EXPECT_TRUE(cauchy["worst_row_perplexity_proxy_rtn"].is_null());
  EXPECT_TRUE(cauchy["fresh_input_source"].is_null());
}

TEST(Report, SetupHoldsTheOptionsOfGptqAndOfBest) {
  Options options;
  options.preset = Preset::kFast;
  options.gptq = options_of(Preset::kFast);
  options.gptq.refine = 2;
  options.gptq.beam_scales = 3;
  json setup = json::parse(results_json(options, sample_runs()))["setup"];
  EXPECT_EQ(setup["preset"], "fast");
  EXPECT_EQ(setup["column_order"], "activation");
  EXPECT_EQ(setup["group_scales"], "static");
  EXPECT_EQ(setup["scale_method"], "mse");
  EXPECT_EQ(setup["full_range"], true);
  EXPECT_EQ(setup["refine"], 2);
  EXPECT_EQ(setup["beam_scales"], 3);
  const json best = {{"column_order", "group"}, {"group_scales", "dynamic"}, {"scale_method", "loss"},
                     {"full_range", true},      {"beam_scales", 2},          {"refine", 2}};
  EXPECT_EQ(setup["best"], best);
  options.gptq.symmetric = false;
  options.best = preset_on_terms(Preset::kBest, options.gptq);
  setup = json::parse(results_json(options, sample_runs()))["setup"];
  EXPECT_EQ(setup["best"]["full_range"], false);
}

TEST(Report, ARidgeOfTheCommandLineIsThatOfEveryRun) {
  const json document = json::parse(results_of(sample_runs()));
  for (const char* run : {"normal", "cauchy"}) {
    EXPECT_EQ(document["runs"][run]["ridge"], 0.01);
    EXPECT_TRUE(document["runs"][run]["ridge_choice"].is_null());
  }
}

TEST(Report, ARidgeFromTheDataSaysHowItWasFound) {
  Options options;
  options.ridge_from_data = true;
  const json document = json::parse(results_json(options, sample_runs_with_ridges()));
  EXPECT_EQ(document["setup"]["ridge"], "auto");
  const json& normal = document["runs"]["normal"];
  EXPECT_EQ(normal["ridge"], 20.0);
  const json expected = {{"ridges", {1.0, 2.0, 1e6}},       {"held_out", {nullptr, 0.75, 1.0}},
                         {"half_tokens", {26, 24}},         {"chosen", 2.0},
                         {"reason", "least held-out loss"}, {"failed", {2.0}}};
  EXPECT_EQ(normal["ridge_choice"], expected);
  const json& cauchy = document["runs"]["cauchy"];
  EXPECT_EQ(cauchy["ridge"], 1e6);
  EXPECT_EQ(cauchy["ridge_choice"]["reason"], "none gains on rounding to nearest");
  EXPECT_EQ(cauchy["ridge_choice"]["failed"], json::array());
}

TEST(Report, EveryUnitIsOfAFigureThatExists) {
  const json document = json::parse(results_of(sample_runs()));
  for (const auto& [name, unit] : document["units"].items()) {
    const std::string figure = name.substr(0, name.find('.'));
    EXPECT_TRUE(document["runs"]["normal"].contains(figure)) << name;
    EXPECT_FALSE(unit.get<std::string>().empty());
  }
}

TEST(Report, FilesHaveNoSeed) {
  Options options;
  options.source = FileSource{};
  auto runs = sample_runs();
  runs[0].problem.weight_origin.file = "w.safetensors";
  runs[0].problem.weight_origin.tensor = "fc.weight";
  const json document = json::parse(results_json(options, runs));
  EXPECT_TRUE(document["setup"]["seed"].is_null());
  EXPECT_EQ(document["setup"]["weight_source"]["kind"], "file");
  EXPECT_EQ(document["setup"]["weight_source"]["tensor"], "fc.weight");
  EXPECT_TRUE(json::parse(manifest_json(options, runs, {}, {}))["seed"].is_null());
}

TEST(Report, TimesAreInTheManifestOnly) {
  auto runs = sample_runs();
  const std::string results = results_of(runs);
  runs[0].seconds[0].second = 123.0;
  EXPECT_EQ(results_of(runs), results);
  Options options;
  options.threads = 7;
  options.output = "elsewhere";
  options.quiet = true;
  EXPECT_EQ(results_json(options, runs), results);

  const json manifest = json::parse(manifest_of(runs, {"gptq_toy", "--bits", "4"},
                                                {{"some/where/results.json", results}, {"/x.safetensors", "layer"}}));
  EXPECT_EQ(manifest["seconds"]["normal"], json({{"inputs", 123.0}, {"gptq", 0.25}}));
  EXPECT_EQ(manifest["seconds"]["cauchy"]["inputs"], 0.5);
  EXPECT_EQ(manifest["command"], json({"gptq_toy", "--bits", "4"}));
  EXPECT_EQ(manifest["outputs"], json({{"results.json", sha256(results)}, {"x.safetensors", sha256("layer")}}));
  EXPECT_EQ(manifest["instruction_set"], instruction_set());
  EXPECT_EQ(manifest["threads"], at::get_num_threads());
  EXPECT_TRUE(manifest["check"].is_null());
}

TEST(Report, TheManifestHoldsTheCheck) {
  auto runs = sample_runs();
  runs[0].comparison.check = CheckFigures{.agreements = {{.name = "a",
                                                          .differing_codes = 3,
                                                          .differing_rows = 2,
                                                          .largest_row_loss_difference = 0.5,
                                                          .loss_difference = 0.25}},
                                          .passed = true};
  const json manifest = json::parse(manifest_of(runs, {}, {}));
  EXPECT_EQ(manifest["check"]["normal"]["passed"], true);
  EXPECT_EQ(manifest["check"]["normal"]["agreements"][0]["differing_codes"], 3);
  EXPECT_FALSE(manifest["check"].contains("cauchy"));
}

TEST(Report, AnArgumentThatIsNotUtf8IsReplaced) {
  const std::string text = manifest_of(sample_runs(), {"gptq_toy", "--output", "\xFF"}, {});
  EXPECT_EQ(json::parse(text)["command"][2], "\xEF\xBF\xBD");
}

}  // namespace
}  // namespace miniquant::driver
