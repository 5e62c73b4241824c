#pragma once

#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "driver/report.h"

namespace miniquant::driver {

/// Two runs with figures that are easy to tell apart, not computed from anything.
inline std::vector<Run> sample_runs() {
  Run normal;
  normal.problem.name = "normal";
  normal.problem.weight = at::empty({3, 200}, at::kMeta);
  normal.problem.inputs = at::empty({50, 200}, at::kMeta);
  normal.problem.fresh_inputs = at::empty({70, 200}, at::kMeta);
  normal.problem.weight_origin = {"", "", "drawn weight", "F32", {3, 200}, std::string(64, '0')};
  normal.problem.input_origin = {"", "", "drawn inputs", "F32", {200, 50}, std::string(64, '1')};
  normal.problem.fresh_input_origin =
      TensorOrigin{"", "", "drawn fresh inputs", "F32", {200, 70}, std::string(64, '2')};
  normal.seconds = {{"inputs", 0.5}, {"gptq", 0.25}};
  Comparison& figures = normal.comparison;
  figures.rtn = {.row_loss = {1.0, 2.0, 5.0},
                 .loss = 8.0,
                 .fresh_loss = 6.0,
                 .worst_row_perplexity_proxy = 1.5,
                 .codes_sha256 = std::string(64, 'a')};
  figures.gptq = {.row_loss = {0.5, 0.5, 1.0},
                  .loss = 2.0,
                  .fresh_loss = 9.0,
                  .worst_row_perplexity_proxy = 1.25,
                  .codes_sha256 = std::string(64, 'b')};
  figures.best = {.row_loss = {0.25, 0.5, 0.75},
                  .loss = 1.5,
                  .fresh_loss = 4.5,
                  .worst_row_perplexity_proxy = 1.125,
                  .codes_sha256 = std::string(64, 'c')};
  figures.ridge = 0.01;
  figures.ridge_added = 0.125;
  figures.n_grid_changes = 60;
  figures.grid_change_share = 0.1;
  figures.rows_improved = 3;
  figures.top_rows_absolute = top_rows_absolute(figures.rtn.row_loss, figures.gptq.row_loss, 10);
  figures.top_rows_relative = top_rows_relative(figures.rtn.row_loss, figures.gptq.row_loss, 10);

  Run cauchy = normal;
  cauchy.problem.name = "cauchy";
  cauchy.comparison.rtn.loss = 0.0;
  cauchy.comparison.gptq.loss = 0.0;
  cauchy.comparison.rtn.fresh_loss = std::nullopt;
  cauchy.comparison.gptq.fresh_loss = std::nullopt;
  cauchy.comparison.best.fresh_loss = std::nullopt;
  cauchy.comparison.rtn.worst_row_perplexity_proxy = std::nullopt;
  cauchy.problem.fresh_input_origin.reset();
  return {normal, cauchy};
}

/// The same with a ridge from the data: raised once in the first run, rounding to nearest in the second.
inline std::vector<Run> sample_runs_with_ridges() {
  std::vector<Run> runs = sample_runs();
  runs[0].comparison.ridge = 20.0;
  runs[0].comparison.ridge_choice = RidgeFigures{
      .choice = {.ridge = 2.0, .ridges = {1.0, 2.0, 1e6}, .held_out = {INFINITY, 0.75, 1.0}, .fallbacks = {20.0}},
      .half_tokens = {26, 24},
      .failed = {2.0}};
  runs[1].comparison.ridge = 1e6;
  runs[1].comparison.ridge_choice =
      RidgeFigures{.choice = {.ridge = 1e6, .ridges = {1.0, 2.0, 1e6}, .held_out = {1.5, 1.25, 1.0}, .fallbacks = {}},
                   .half_tokens = {26, 24},
                   .failed = {}};
  return runs;
}

}  // namespace miniquant::driver
