#include "driver/table.h"

#include <miniquant/names.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <optional>
#include <string_view>
#include <variant>

#include "driver/build_info.h"

namespace miniquant::driver {
namespace {

constexpr std::size_t kLabelWidth = 24;
constexpr std::size_t kCellWidth = 11;
constexpr std::size_t kCellsPerRun = 3;
constexpr std::size_t kRunWidth = kCellWidth * kCellsPerRun;
constexpr std::size_t kTopRowsShown = 5;

std::string right(const std::string& text, std::size_t width) {
  return std::string(text.size() >= width ? 1 : width - text.size(), ' ').append(text);
}

std::string left(const std::string& text, std::size_t width) {
  return text + std::string(text.size() >= width ? 1 : width - text.size(), ' ');
}

std::string printed(const char* format, double value) {
  char buffer[64];
  std::snprintf(buffer, sizeof(buffer), format, value);
  return buffer;
}

std::string figure(double value) { return printed("%.6g", value); }
std::string figure(const std::optional<double>& value) { return value ? figure(*value) : "-"; }
std::string short_figure(double value) { return printed("%.4g", value); }
std::string short_figure(const std::optional<double>& value) { return value ? short_figure(*value) : "-"; }
std::string percent(double share) { return printed("%.2f%%", 100.0 * share); }
std::string held_out_text(double value) { return std::isfinite(value) ? printed("%.4f", value) : "-"; }
std::string seconds_text(double value) { return printed("%.4f", value); }

std::string dimensions(const Problem& problem) {
  return std::to_string(problem.weight.size(0)) + " x " + std::to_string(problem.weight.size(1));
}

std::string source_text(const Options& options, const Problem& problem) {
  if (const auto* synthetic = std::get_if<SyntheticSource>(&options.source)) {
    return "random, seed " + std::to_string(synthetic->seed);
  }
  return problem.weight_origin.tensor + " of " + problem.weight_origin.file + " (" + problem.weight_origin.dtype + ")";
}

// The options that a preset sets.
std::string scheme_text(const GptqOptions& gptq) {
  std::string text(name_of(gptq.column_order));
  text.append(" order, ").append(name_of(gptq.group_scales)).append(" scales by ").append(name_of(gptq.scale_method));
  if (gptq.full_range) text += ", full range";
  if (gptq.beam_scales > 0) text += ", beam search";
  if (gptq.refine > 0)
    text += ", " + std::to_string(gptq.refine) + (gptq.refine == 1 ? " round" : " rounds") + " of refinement";
  return text;
}

std::string heading(const Options& options, const Problem& problem) {
  const GptqOptions& gptq = options.gptq;
  const std::string groups = gptq.group_size < 0 ? "one group per row" : "groups of " + std::to_string(gptq.group_size);
  const std::string fresh =
      problem.fresh_inputs ? std::to_string(problem.fresh_inputs->size(0)) + " fresh ones" : "no fresh ones";
  return "gptq_toy " + build_info().miniquant +
         ": round to nearest (RTN), GPTQ and its best preset on one linear layer\n" + "  weight  " +
         dimensions(problem) + ", " + source_text(options, problem) + "\n" + "  inputs  " +
         std::to_string(problem.inputs.size(0)) + " calibration tokens, " + fresh + "\n" + "  grid    " +
         std::to_string(gptq.bits) + " bits, " + (gptq.symmetric ? "symmetric" : "asymmetric") + ", " + groups +
         "; ridge " + (options.ridge_from_data ? "from the data" : short_figure(gptq.ridge)) + ", blocks of " +
         std::to_string(gptq.block_size) + "\n" + "  GPTQ    " + scheme_text(gptq) + "\n" + "  best    " +
         scheme_text(options.best) + "\n";
}

class Grid {
 public:
  explicit Grid(const std::vector<Run>& runs) : runs_(runs) {}

  void blank() { text_ += '\n'; }

  // Adds a label and, for every run, the texts of `cells`: at most kCellsPerRun.
  void line(const std::string& label, const std::function<std::vector<std::string>(const Run&)>& cells) {
    std::string result = left(label, kLabelWidth);
    for (const Run& run : runs_) {
      std::string block;
      for (const std::string& cell : cells(run)) block += right(cell, kCellWidth);
      block.resize(std::max(block.size(), kRunWidth), ' ');
      result += "  " + block;
    }
    result.erase(result.find_last_not_of(' ') + 1);
    text_ += result + '\n';
  }

  // Adds the names of the runs, each over its own columns.
  void names() {
    line("", [](const Run& run) {
      // right() puts one blank before a text as wide as this.
      const std::string name = " " + run.problem.name + " ";
      const std::size_t rule = kRunWidth - 2 - std::min(name.size(), kRunWidth - 2);
      std::string cell(1, ' ');
      cell.append(rule / 2, '-').append(name).append(rule - rule / 2, '-');
      return std::vector<std::string>{cell};
    });
  }

  [[nodiscard]] const std::string& text() const { return text_; }

 private:
  const std::vector<Run>& runs_;
  std::string text_;
};

using Cells = std::vector<std::string>;

// Each label stands under the line it belongs to.
constexpr const char* kRatios = "  GPTQ/RTN, best/GPTQ";
constexpr const char* kShare = "  share of all";

void add_figures(Grid& grid) {
  grid.names();
  grid.line("", [](const Run&) { return Cells{"RTN", "GPTQ", "best"}; });
  grid.line("calibration loss", [](const Run& run) {
    const Comparison& c = run.comparison;
    return Cells{figure(c.rtn.loss), figure(c.gptq.loss), figure(c.best.loss)};
  });
  grid.line(kRatios, [](const Run& run) {
    const Comparison& c = run.comparison;
    return Cells{"", short_figure(ratio(c.gptq.loss, c.rtn.loss)), short_figure(ratio(c.best.loss, c.gptq.loss))};
  });
  grid.line("fresh loss", [](const Run& run) {
    const Comparison& c = run.comparison;
    return Cells{figure(c.rtn.fresh_loss), figure(c.gptq.fresh_loss), figure(c.best.fresh_loss)};
  });
  grid.line(kRatios, [](const Run& run) {
    const Comparison& c = run.comparison;
    return Cells{"", short_figure(ratio(c.gptq.fresh_loss, c.rtn.fresh_loss)),
                 short_figure(ratio(c.best.fresh_loss, c.gptq.fresh_loss))};
  });
  grid.line("worst row ppl proxy", [](const Run& run) {
    const Comparison& c = run.comparison;
    return Cells{figure(c.rtn.worst_row_perplexity_proxy), figure(c.gptq.worst_row_perplexity_proxy),
                 figure(c.best.worst_row_perplexity_proxy)};
  });
  grid.line("codes changed", [](const Run& run) { return Cells{"", std::to_string(run.comparison.n_grid_changes)}; });
  grid.line(kShare, [](const Run& run) { return Cells{"", percent(run.comparison.grid_change_share)}; });
  grid.line("rows with lower loss",
            [](const Run& run) { return Cells{"", std::to_string(run.comparison.rows_improved)}; });
  grid.line(kShare, [](const Run& run) {
    const Comparison& c = run.comparison;
    return Cells{"", percent(static_cast<double>(c.rows_improved) / static_cast<double>(c.rtn.row_loss.size()))};
  });
}

// Adds the ridges that were tried. A run that tried fewer ends earlier.
void add_ridges(Grid& grid, const std::vector<Run>& runs) {
  if (!runs.front().comparison.ridge_choice) return;
  grid.blank();
  grid.line("ridge, from the data", [](const Run&) { return Cells{"ridge", "held out", ""}; });
  const auto choice_of = [](const Run& run) -> const RidgeChoice& {
    return run.comparison.ridge_choice.value().choice;
  };
  std::size_t most = 0;
  for (const Run& run : runs) most = std::max(most, choice_of(run).ridges.size());
  for (std::size_t i = 0; i < most; ++i) {
    grid.line("", [&](const Run& run) {
      const RidgeChoice& choice = choice_of(run);
      if (i >= choice.ridges.size()) return Cells{};
      const double ridge = choice.ridges.at(i);
      return Cells{short_figure(ridge), held_out_text(choice.held_out.at(i)), ridge == choice.ridge ? "chosen" : ""};
    });
  }
}

// The ridge of a run, and the reason for it.
std::string ridge_text(const Run& run) {
  const Comparison& c = run.comparison;
  if (!c.ridge_choice) return "";
  const RidgeFigures& figures = *c.ridge_choice;
  const std::string halves = "halves of " + std::to_string(figures.half_tokens[0]) + " and " +
                             std::to_string(figures.half_tokens[1]) + " tokens";
  std::string text = "\nridge of '" + run.problem.name + "': " + short_figure(figures.choice.ridge);
  if (figures.rounds_to_nearest()) {
    text += "; held out (" + halves + "), no smaller one beats rounding to nearest.";
    text += "\nWith it H is nearly all ridge, and so is the calibration loss.";
  } else {
    text += ", of least held-out loss (" + halves + ").";
  }
  if (!figures.failed.empty()) {
    text += "\nH was not positive definite with it: " + short_figure(c.ridge) + " was used.";
  }
  return text + "\n";
}

void add_top_rows(Grid& grid, const std::string& title, std::vector<RowGain> Comparison::* rows,
                  std::string (*gain_text)(double)) {
  grid.blank();
  grid.line(title, [](const Run&) { return Cells{"row", "RTN loss", "gain"}; });
  for (std::size_t i = 0; i < kTopRowsShown; ++i) {
    grid.line("", [&](const Run& run) {
      const std::vector<RowGain>& list = run.comparison.*rows;
      if (i >= list.size()) return Cells{};
      return Cells{std::to_string(list[i].row), short_figure(list[i].loss_rtn), gain_text(list[i].gain)};
    });
  }
}

void add_seconds(Grid& grid, const std::vector<Run>& runs) {
  grid.blank();
  grid.line("seconds", [](const Run&) { return Cells{}; });
  for (std::size_t i = 0; i < runs.front().seconds.size(); ++i) {
    grid.line("  " + runs.front().seconds[i].first,
              [&](const Run& run) { return Cells{seconds_text(run.seconds[i].second)}; });
  }
}

std::string check_text(const std::string& name, const CheckFigures& check) {
  std::string text = "\ncheck, " + name + ": " + (check.passed ? "passed" : "FAILED") + "\n";
  for (const Agreement& agreement : check.agreements) {
    text += "  " + left(agreement.name, 40) + std::to_string(agreement.differing_codes) + " codes differ, in " +
            std::to_string(agreement.differing_rows) + " rows; loss differs by " +
            short_figure(agreement.loss_difference) + ", of a row by at most " +
            short_figure(agreement.largest_row_loss_difference) + " (relative)\n";
  }
  return text;
}

// A note that a reader needs to judge the figures of a run.
std::string note(const Options& options, const Run& run) {
  const Comparison& c = run.comparison;
  const std::optional<double> gptq = ratio(c.gptq.fresh_loss, c.rtn.fresh_loss);
  const std::optional<double> best = ratio(c.best.fresh_loss, c.rtn.fresh_loss);
  std::string which;
  const auto above_rtn = [](const std::optional<double>& loss) {
    return loss && *loss > 1.0 && short_figure(loss) != short_figure(1.0);
  };
  if (above_rtn(gptq)) which = " GPTQ's loss is " + short_figure(gptq);
  if (above_rtn(best)) which += (which.empty() ? " best's loss is " : ", best's ") + short_figure(best);
  if (which.empty()) return "";
  std::string text = "\nnote: on the fresh inputs of '" + run.problem.name + "'" + which + " times that of RTN.";
  const int64_t tokens = run.problem.inputs.size(0);
  const int64_t columns = run.problem.weight.size(1);
  if (tokens < columns) {
    text.append("\n")
        .append(std::to_string(tokens))
        .append(" tokens do not determine ")
        .append(std::to_string(columns));
    text.append(" input features: GPTQ moves error to directions that the tokens do not cover.\n");
    text.append(options.ridge_from_data ? "More tokens help."
                                        : "More tokens or a larger --ridge help; so does --ridge auto.");
  }
  return text + "\n";
}

}  // namespace

std::string table(const Options& options, const std::vector<Run>& runs) {
  Grid grid(runs);
  grid.blank();
  add_figures(grid);
  add_ridges(grid, runs);
  add_top_rows(grid, "largest gain, absolute", &Comparison::top_rows_absolute, short_figure);
  add_top_rows(grid, "largest gain, relative", &Comparison::top_rows_relative, percent);
  add_seconds(grid, runs);
  std::string text = heading(options, runs.front().problem) + grid.text();
  for (const Run& run : runs) text += ridge_text(run) + note(options, run);
  for (const Run& run : runs) {
    if (const auto& check = run.comparison.check) text += check_text(run.problem.name, *check);
  }
  return text;
}

}  // namespace miniquant::driver
