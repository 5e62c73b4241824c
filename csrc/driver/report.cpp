#include "driver/report.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <miniquant/build.h>
#include <miniquant/names.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <variant>

#include "driver/build_info.h"
#include "driver/sha256.h"

namespace miniquant::driver {
namespace {

using json = nlohmann::ordered_json;

// Version of results.json. Version 2 added the best preset and the options of GPTQ that presets set. In version 3
// setup.ridge may be "auto", and each run has its own ridge and how it was chosen.
constexpr int kResultsVersion = 3;
// Version of manifest.json. Version 2 added instruction_set.
constexpr int kManifestVersion = 2;

json or_null(const std::optional<double>& value) { return value ? json(*value) : json(nullptr); }

std::string text_of(const json& document) {
  // A file name may be invalid UTF-8, which JSON does not allow.
  return document.dump(2, ' ', /*ensure_ascii=*/false, json::error_handler_t::replace) + "\n";
}

json units() {
  const char* loss = "squared output, summed over rows, mean over tokens";
  const char* row_loss = "squared output, mean over tokens";
  const char* none = "dimensionless";
  return {{"loss_rtn", loss},
          {"loss_gptq", loss},
          {"loss_best", loss},
          {"loss_ratio", none},
          {"best_ratio", none},
          {"fresh_loss_rtn", loss},
          {"fresh_loss_gptq", loss},
          {"fresh_loss_best", loss},
          {"fresh_loss_ratio", none},
          {"fresh_best_ratio", none},
          {"worst_row_perplexity_proxy_rtn", none},
          {"worst_row_perplexity_proxy_gptq", none},
          {"worst_row_perplexity_proxy_best", none},
          {"n_grid_changes", "weights"},
          {"grid_change_share", none},
          {"rows_improved", "rows"},
          {"ridge", none},
          {"ridge_added", "squared input, mean over tokens"},
          {"ridge_choice.held_out", none},
          {"ridge_choice.half_tokens", "tokens"},
          {"row_loss_rtn", row_loss},
          {"row_loss_gptq", row_loss},
          {"row_loss_best", row_loss},
          {"top_rows_absolute.gain", row_loss},
          {"top_rows_relative.gain", none}};
}

json definitions() {
  return {
      {"notation",
       "W [N, K]: weight; Q: what codes and scales stand for; E = W - Q, e_r its row r; w_r row r of W; n: calibration "
       "tokens; m: fresh tokens; H = X X^T / n + ridge * mean(diag(X X^T / n)) * I"},
      {"schemes",
       "rtn: round to nearest on the plain grid, each scale just holding its group's range; gptq: GPTQ with the "
       "options of setup; best: GPTQ with the best preset, that is with setup.best in place of setup's options of that "
       "name"},
      {"loss", "tr(E H E^T), the sum of row_loss"},
      {"row_loss", "e_r H e_r^T for every row r, in row order"},
      {"loss_ratio", "loss_gptq / loss_rtn; null where loss_rtn is 0"},
      {"best_ratio", "loss_best / loss_gptq; null where loss_gptq is 0"},
      {"fresh_loss", "tr(E F E^T) with F = Y Y^T / m of inputs Y that calibration did not see, without a ridge"},
      {"fresh_loss_ratio", "fresh_loss_gptq / fresh_loss_rtn; null without fresh inputs or where fresh_loss_rtn is 0"},
      {"fresh_best_ratio",
       "fresh_loss_best / fresh_loss_gptq; null without fresh inputs or where fresh_loss_gptq is 0"},
      {"worst_row_perplexity_proxy",
       "exp(max over rows r of (e_r H e_r^T) / (w_r H w_r^T)): 1 is no error; rows with w_r H w_r^T = 0 are left out"},
      {"n_grid_changes", "weights whose GPTQ code differs from their RTN code"},
      {"grid_change_share", "n_grid_changes / (N * K)"},
      {"rows_improved", "rows whose row_loss is lower with GPTQ than with RTN"},
      {"ridge", "of H, for gptq and best alike: setup.ridge, or where that is auto the one that ridge_choice led to"},
      {"ridge_choice",
       "null unless setup.ridge is auto; ridges: those judged, with the last GPTQ rounds to nearest; held_out: for "
       "each the loss of some rows of W with the codes of one half of the tokens and H of the other half, both ways "
       "round for fewer than 4096 columns, relative to that of the last, null where H was not positive definite; "
       "half_tokens: tokens of either "
       "half; chosen: the ridge of least held_out, and reason says whether it gains on rounding to nearest; failed: "
       "the ridges with which H of all tokens was not positive definite, each followed by one ten times larger"},
      {"ridge_added", "ridge * mean(diag(X X^T / n)), what the ridge adds to every diagonal element"},
      {"top_rows_absolute", "rows with the largest gain = loss_rtn - loss_gptq, largest first"},
      {"top_rows_relative", "rows with the largest gain = 1 - loss_gptq / loss_rtn, largest first"},
      {"codes_sha256", "SHA-256 of the codes as int8 [N, K], row-major"}};
}

json source_json(const TensorOrigin& origin) {
  json source;
  if (origin.file.empty()) {
    source["kind"] = "random";
    source["description"] = origin.description;
  } else {
    source["kind"] = "file";
    source["file"] = origin.file;
    source["tensor"] = origin.tensor;
  }
  source["dtype"] = origin.dtype;
  source["shape"] = origin.shape;
  source["sha256"] = origin.sha256;
  return source;
}

json seed_json(const Options& options) {
  const auto* synthetic = std::get_if<SyntheticSource>(&options.source);
  return synthetic != nullptr ? json(synthetic->seed) : json(nullptr);
}

// The options that a preset sets.
json preset_json(const GptqOptions& gptq) {
  return {{"column_order", name_of(gptq.column_order)},
          {"group_scales", name_of(gptq.group_scales)},
          {"scale_method", name_of(gptq.scale_method)},
          {"full_range", gptq.full_range},
          {"beam_scales", gptq.beam_scales},
          {"refine", gptq.refine}};
}

json setup_json(const Options& options, const Problem& problem) {
  const GptqOptions& gptq = options.gptq;
  json setup = {{"rows", problem.weight.size(0)},
                {"columns", problem.weight.size(1)},
                {"tokens", problem.inputs.size(0)},
                {"fresh_tokens", problem.fresh_inputs ? problem.fresh_inputs->size(0) : 0},
                {"bits", gptq.bits},
                {"group_size", gptq.group_size},
                {"symmetric", gptq.symmetric},
                {"ridge", options.ridge_from_data ? json("auto") : json(gptq.ridge)},
                {"block_size", gptq.block_size},
                {"preset", name_of(options.preset)}};
  setup.update(preset_json(gptq));
  setup["best"] = preset_json(options.best);
  setup["seed"] = seed_json(options);
  setup["weight_source"] = source_json(problem.weight_origin);
  return setup;
}

json rows_json(const std::vector<RowGain>& rows) {
  json list = json::array();
  for (const RowGain& row : rows) {
    list.push_back({{"row", row.row}, {"loss_rtn", row.loss_rtn}, {"loss_gptq", row.loss_gptq}, {"gain", row.gain}});
  }
  return list;
}

json ridge_choice_json(const std::optional<RidgeFigures>& figures) {
  if (!figures) return nullptr;
  json held_out = json::array();
  for (const double loss : figures->choice.held_out) held_out.push_back(std::isfinite(loss) ? json(loss) : nullptr);
  return {{"ridges", figures->choice.ridges},
          {"held_out", held_out},
          {"half_tokens", figures->half_tokens},
          {"chosen", figures->choice.ridge},
          {"reason", figures->rounds_to_nearest() ? "none gains on rounding to nearest" : "least held-out loss"},
          {"failed", figures->failed}};
}

json run_json(const Run& run) {
  const Comparison& figures = run.comparison;
  const SchemeFigures& rtn = figures.rtn;
  const SchemeFigures& gptq = figures.gptq;
  const SchemeFigures& best = figures.best;
  const std::optional<TensorOrigin>& fresh = run.problem.fresh_input_origin;
  return {{"input_source", source_json(run.problem.input_origin)},
          {"fresh_input_source", fresh ? source_json(*fresh) : json(nullptr)},
          {"loss_rtn", rtn.loss},
          {"loss_gptq", gptq.loss},
          {"loss_best", best.loss},
          {"loss_ratio", or_null(ratio(gptq.loss, rtn.loss))},
          {"best_ratio", or_null(ratio(best.loss, gptq.loss))},
          {"fresh_loss_rtn", or_null(rtn.fresh_loss)},
          {"fresh_loss_gptq", or_null(gptq.fresh_loss)},
          {"fresh_loss_best", or_null(best.fresh_loss)},
          {"fresh_loss_ratio", or_null(ratio(gptq.fresh_loss, rtn.fresh_loss))},
          {"fresh_best_ratio", or_null(ratio(best.fresh_loss, gptq.fresh_loss))},
          {"worst_row_perplexity_proxy_rtn", or_null(rtn.worst_row_perplexity_proxy)},
          {"worst_row_perplexity_proxy_gptq", or_null(gptq.worst_row_perplexity_proxy)},
          {"worst_row_perplexity_proxy_best", or_null(best.worst_row_perplexity_proxy)},
          {"n_grid_changes", figures.n_grid_changes},
          {"grid_change_share", figures.grid_change_share},
          {"rows_improved", figures.rows_improved},
          {"ridge", figures.ridge},
          {"ridge_added", figures.ridge_added},
          {"ridge_choice", ridge_choice_json(figures.ridge_choice)},
          {"codes_sha256_rtn", rtn.codes_sha256},
          {"codes_sha256_gptq", gptq.codes_sha256},
          {"codes_sha256_best", best.codes_sha256},
          {"top_rows_absolute", rows_json(figures.top_rows_absolute)},
          {"top_rows_relative", rows_json(figures.top_rows_relative)},
          {"row_loss_rtn", rtn.row_loss},
          {"row_loss_gptq", gptq.row_loss},
          {"row_loss_best", best.row_loss}};
}

json check_json(const CheckFigures& check) {
  json agreements = json::array();
  for (const Agreement& agreement : check.agreements) {
    agreements.push_back({{"compared", agreement.name},
                          {"differing_codes", agreement.differing_codes},
                          {"differing_rows", agreement.differing_rows},
                          {"largest_relative_row_loss_difference", agreement.largest_row_loss_difference},
                          {"relative_loss_difference", agreement.loss_difference}});
  }
  return {{"passed", check.passed}, {"agreements", agreements}};
}

}  // namespace

std::string results_json(const Options& options, const std::vector<Run>& runs) {
  json document;
  document["schema_version"] = kResultsVersion;
  document["units"] = units();
  document["definitions"] = definitions();
  document["setup"] = setup_json(options, runs.front().problem);
  document["runs"] = json::object();
  for (const Run& run : runs) document["runs"][run.problem.name] = run_json(run);
  return text_of(document);
}

std::string manifest_json(const Options& options, const std::vector<Run>& runs, const std::vector<std::string>& command,
                          const std::vector<OutputFile>& outputs) {
  const BuildInfo& build = build_info();
  json document;
  document["schema_version"] = kManifestVersion;
  document["command"] = command;
  document["seed"] = seed_json(options);
  document["versions"] = {{"miniquant", build.miniquant},
                          {"torch", build.torch},
                          {"compiler", build.compiler},
                          {"cxx_standard", build.cxx_standard}};
  document["git_revision"] = build.git_revision.empty() ? json(nullptr) : json(build.git_revision);
  document["instruction_set"] = instruction_set();
  document["cpu_capability"] = at::get_cpu_capability();
  document["threads"] = at::get_num_threads();
  document["seconds"] = json::object();
  document["check"] = nullptr;
  for (const Run& run : runs) {
    json& seconds = document["seconds"][run.problem.name] = json::object();
    for (const auto& [stage, time] : run.seconds) seconds[stage] = time;
    if (const auto& check = run.comparison.check) document["check"][run.problem.name] = check_json(*check);
  }
  for (const OutputFile& output : outputs) document["outputs"][output.path.filename().string()] = sha256(output.text);
  return text_of(document);
}

}  // namespace miniquant::driver
