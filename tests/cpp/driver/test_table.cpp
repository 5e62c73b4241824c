#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>

#include "driver/table.h"
#include "sample_runs.h"

namespace miniquant::driver {
namespace {

using testing::HasSubstr;
using testing::Not;

std::string shown(const std::vector<Run>& runs) {
  const Options options;
  return table(options, runs);
}

std::string line_with(const std::string& text, const std::string& start) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with(start)) return line;
  }
  return "no line starts with " + start;
}

std::string line_after(const std::string& text, const std::string& start) {
  return line_with(text.substr(text.find('\n', text.find('\n' + start) + 1) + 1), "  ");
}

TEST(Table, ShowsBothRunsSideBySide) {
  const std::string text = shown(sample_runs());
  EXPECT_THAT(text, HasSubstr("3 x 200, random, seed 42"));
  EXPECT_THAT(text, HasSubstr("50 calibration tokens, 70 fresh ones"));
  EXPECT_THAT(text, HasSubstr("4 bits, symmetric, groups of 64; ridge 0.01, blocks of 128"));
  EXPECT_EQ(line_with(text, "  GPTQ "), "  GPTQ    natural order, static scales by absmax");
  EXPECT_EQ(line_with(text, "  best "),
            "  best    group order, dynamic scales by loss, full range, beam search, 2 rounds of refinement");
  EXPECT_THAT(line_with(text, "calibration loss"), testing::MatchesRegex("calibration loss +8 +2 +1.5 +0 +0 +1.5"));
  EXPECT_THAT(line_after(text, "calibration loss"), testing::MatchesRegex("  GPTQ/RTN, best/GPTQ +0.25 +0.75 +- +-"));
  EXPECT_THAT(line_with(text, "fresh loss"), testing::MatchesRegex("fresh loss +6 +9 +4.5 +- +- +-"));
  EXPECT_THAT(line_after(text, "fresh loss"), testing::MatchesRegex("  GPTQ/RTN, best/GPTQ +1.5 +0.5 +- +-"));
  EXPECT_THAT(line_with(text, "worst row"),
              testing::MatchesRegex("worst row ppl proxy +1.5 +1.25 +1.125 +- +1.25 +1.125"));
  EXPECT_THAT(line_with(text, "codes changed"), testing::MatchesRegex("codes changed +60 +60"));
  EXPECT_THAT(line_after(text, "codes changed"), testing::MatchesRegex("  share of all +10.00% +10.00%"));
  EXPECT_THAT(line_after(text, "rows with lower"), testing::MatchesRegex("  share of all +100.00% +100.00%"));
  EXPECT_THAT(line_with(text, "  gptq"), testing::MatchesRegex("  gptq +0.2500 +0.2500"));
}

TEST(Table, TheHeadingSaysWhatGptqWasGiven) {
  Options options;
  options.gptq.column_order = ColumnOrder::kActivation;
  options.gptq.scale_method = ScaleMethod::kHessian;
  options.gptq.symmetric = false;
  options.gptq.refine = 3;
  options.best = preset_on_terms(Preset::kBest, options.gptq);
  const std::string text = table(options, sample_runs());
  EXPECT_EQ(line_with(text, "  GPTQ "), "  GPTQ    activation order, static scales by hessian, 3 rounds of refinement");
  EXPECT_EQ(line_with(text, "  best "),
            "  best    group order, dynamic scales by loss, beam search, 2 rounds of refinement");
}

TEST(Table, ShowsWhatARidgeFromTheDataWasChosenFrom) {
  EXPECT_THAT(shown(sample_runs()), Not(HasSubstr("ridge, from the data")));
  Options options;
  options.ridge_from_data = true;
  const std::string text = table(options, sample_runs_with_ridges());
  EXPECT_THAT(text, HasSubstr("groups of 64; ridge from the data, blocks of 128"));
  EXPECT_THAT(line_with(text, "ridge, from"), testing::MatchesRegex("ridge, from the data( +ridge +held out){2}"));
  const std::string judged = text.substr(text.find("ridge, from"));
  EXPECT_THAT(line_with(judged, "     "), testing::MatchesRegex(" +1 +- +1 +1.5000"));
  EXPECT_THAT(judged,
              testing::ContainsRegex(" +2 +0.7500 +chosen +2 +1.2500\n +1e\\+06 +1.0000 +1e\\+06 +1.0000 +chosen"));
  EXPECT_THAT(text, HasSubstr("ridge of 'normal': 2, of least held-out loss (halves of 26 and 24 tokens).\n"
                              "H was not positive definite with it: 20 was used.\n"));
  EXPECT_THAT(text, HasSubstr("ridge of 'cauchy': 1e+06; held out (halves of 26 and 24 tokens), no smaller one beats "
                              "rounding to nearest.\nWith it H is nearly all ridge"));
}

TEST(Table, FitsATerminalAndIsPlain) {
  Options options;
  options.ridge_from_data = true;
  const std::string text = shown(sample_runs()) + table(options, sample_runs_with_ridges());
  EXPECT_EQ(text.back(), '\n');
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    EXPECT_LE(line.size(), 110U) << line;
    EXPECT_TRUE(line.empty() || line.back() != ' ') << line;
    for (const char c : line) EXPECT_TRUE(c >= ' ' && c <= '~') << line;
  }
}

TEST(Table, AFreshLossAboveRtnIsPointedOut) {
  auto runs = sample_runs();
  EXPECT_THAT(shown(runs), HasSubstr("note: on the fresh inputs of 'normal' GPTQ's loss is 1.5 times that of RTN.\n"
                                     "50 tokens do not determine 200 input features"));
  EXPECT_THAT(shown(runs), Not(HasSubstr("inputs of 'cauchy'")));
  runs[0].comparison.best.fresh_loss = 7.5;
  EXPECT_THAT(shown(runs), HasSubstr("inputs of 'normal' GPTQ's loss is 1.5, best's 1.25 times that of RTN.\n"));
  runs[0].comparison.gptq.fresh_loss = 3.0;
  EXPECT_THAT(shown(runs), HasSubstr("inputs of 'normal' best's loss is 1.25 times that of RTN.\n"));
  runs[0].comparison.best.fresh_loss = 6.0001;  // printed as 1 times
  EXPECT_THAT(shown(runs), Not(HasSubstr("note:")));
  runs[0].comparison.best.fresh_loss = 6.0;
  EXPECT_THAT(shown(runs), Not(HasSubstr("note:")));
}

TEST(Table, AdviceOnTheRidgeIsForWhoGaveOne) {
  EXPECT_THAT(shown(sample_runs()), HasSubstr("\nMore tokens or a larger --ridge help; so does --ridge auto.\n"));
  Options options;
  options.ridge_from_data = true;
  EXPECT_THAT(table(options, sample_runs_with_ridges()), HasSubstr("\nMore tokens help.\n"));
}

TEST(Table, ShowsTheCheck) {
  auto runs = sample_runs();
  EXPECT_THAT(shown(runs), Not(HasSubstr("check")));
  runs[1].comparison.check = CheckFigures{.agreements = {{.name = "a and b",
                                                          .differing_codes = 3,
                                                          .differing_rows = 2,
                                                          .largest_row_loss_difference = 0.5,
                                                          .loss_difference = 0.25}},
                                          .passed = false};
  const std::string text = shown(runs);
  EXPECT_THAT(text, HasSubstr("check, cauchy: FAILED"));
  EXPECT_THAT(text, testing::ContainsRegex("a and b +3 codes differ, in 2 rows; loss differs by 0.25"));
}

}  // namespace
}  // namespace miniquant::driver
