#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <miniquant/miniquant.h>

#include <cmath>

#include "driver/comparison.h"
#include "driver/error.h"
#include "driver/sha256.h"

namespace miniquant::driver {
namespace {

using testing::ElementsAre;

Stages quiet_stages() {
  return Stages([](std::string_view) {});
}

Comparison compared(const Problem& problem, const Options& options) {
  Stages stages = quiet_stages();
  return compare(problem, options, stages);
}

Comparison compared(const Problem& problem, const GptqOptions& gptq = {}, bool check = false) {
  Options options;
  options.gptq = gptq;
  options.best = preset_on_terms(Preset::kBest, gptq);
  options.check = check;
  return compared(problem, options);
}

// More columns than tokens, and a shorter last group.
Problem small_problem(Distribution distribution = Distribution::kNormal) {
  return draw_problem({.rows = 48, .columns = 80, .tokens = 30, .fresh_tokens = 200, .seed = 3}, distribution);
}

// tr(E H E^T), written as in the definition.
double loss_of(const at::Tensor& weight, const at::Tensor& value, const at::Tensor& hessian) {
  const at::Tensor error = weight.to(at::kDouble) - value.to(at::kDouble);
  return (at::mm(error, hessian) * error).sum().item<double>();
}

at::Tensor hessian64(const at::Tensor& inputs, double ridge) {
  const at::Tensor x = inputs.to(at::kDouble);
  const at::Tensor hessian = at::mm(x.t(), x) / static_cast<double>(x.size(0));
  return hessian + ridge * hessian.diagonal().mean() * at::eye(hessian.size(0), at::kDouble);
}

TEST(Comparison, Ratio) {
  EXPECT_EQ(ratio(1.0, 4.0), 0.25);
  EXPECT_EQ(ratio(0.0, 4.0), 0.0);
  EXPECT_EQ(ratio(1.0, 0.0), std::nullopt);
}

TEST(Comparison, RatioOfWhatMayBeMissing) {
  const std::optional<double> none;
  EXPECT_EQ(ratio(std::optional(1.0), std::optional(4.0)), 0.25);
  EXPECT_EQ(ratio(none, std::optional(4.0)), std::nullopt);
  EXPECT_EQ(ratio(std::optional(1.0), none), std::nullopt);
  EXPECT_EQ(ratio(std::optional(1.0), std::optional(0.0)), std::nullopt);
}

// Options of GPTQ in which every value that RTN and best might take over differs from its default.
GptqOptions unusual_options() {
  GptqOptions options = options_of(Preset::kFast);
  options.bits = 3;
  options.group_size = 32;
  options.ridge = 0.5;
  options.block_size = 16;
  options.refine = 5;
  return options;
}

TEST(Comparison, RtnOptionsArePlain) {
  GptqOptions gptq = unusual_options();
  for (const bool symmetric : {true, false}) {
    gptq.symmetric = symmetric;
    gptq.full_range = symmetric;
    const GridOptions options = rtn_options(gptq);
    EXPECT_EQ(options.bits, 3);
    EXPECT_EQ(options.group_size, 32);
    EXPECT_EQ(options.symmetric, symmetric);
    EXPECT_FALSE(options.full_range);
    EXPECT_EQ(options.scale_method, ScaleMethod::kAbsmax);
  }
}

TEST(Comparison, BestIsThePresetOnTheSameTerms) {
  GptqOptions gptq = unusual_options();
  const GptqOptions preset = options_of(Preset::kBest);
  for (const bool symmetric : {true, false}) {
    gptq.symmetric = symmetric;
    gptq.full_range = symmetric;
    const GptqOptions options = preset_on_terms(Preset::kBest, gptq);
    EXPECT_EQ(options.bits, 3);
    EXPECT_EQ(options.group_size, 32);
    EXPECT_EQ(options.symmetric, symmetric);
    EXPECT_EQ(options.full_range, symmetric);
    EXPECT_EQ(options.ridge, 0.5);
    EXPECT_EQ(options.block_size, 16);
    EXPECT_EQ(options.scale_method, preset.scale_method);
    EXPECT_EQ(options.group_scales, preset.group_scales);
    EXPECT_EQ(options.column_order, preset.column_order);
    EXPECT_EQ(options.beam_scales, preset.beam_scales);
    EXPECT_EQ(options.refine, preset.refine);
  }
}

TEST(Comparison, MeanDiagonal) { EXPECT_EQ(mean_diagonal(at::tensor({1.0, 9.0, 9.0, 2.0}).view({2, 2})), 1.5); }

TEST(Comparison, WorstRowPerplexityProxy) {
  EXPECT_EQ(worst_row_perplexity_proxy({1.0, 3.0, 2.0}, {10.0, 10.0, 4.0}), std::exp(0.5));
  EXPECT_EQ(worst_row_perplexity_proxy({0.0, 1.0}, {0.0, 4.0}), std::exp(0.25));
  EXPECT_EQ(worst_row_perplexity_proxy({0.0}, {0.0}), std::nullopt);
  EXPECT_EQ(worst_row_perplexity_proxy({1000.0}, {1.0}), std::nullopt);
}

TEST(Comparison, TopRows) {
  const std::vector<double> rtn = {4.0, 10.0, 0.0, 2.0, 10.0};
  const std::vector<double> gptq = {1.0, 6.0, 0.0, 3.0, 6.0};
  const auto rows = [](const std::vector<RowGain>& gains) {
    std::vector<int64_t> list;
    for (const RowGain& gain : gains) list.push_back(gain.row);
    return list;
  };
  const std::vector<RowGain> absolute = top_rows_absolute(rtn, gptq, 10);
  EXPECT_THAT(rows(absolute), ElementsAre(1, 4, 0, 2, 3));
  EXPECT_EQ(absolute[2].gain, 3.0);
  EXPECT_EQ(absolute[2].loss_rtn, 4.0);
  EXPECT_EQ(absolute[2].loss_gptq, 1.0);
  EXPECT_EQ(absolute[4].gain, -1.0);
  const std::vector<RowGain> relative = top_rows_relative(rtn, gptq, 10);
  EXPECT_THAT(rows(relative), ElementsAre(0, 1, 4, 3));
  EXPECT_EQ(relative[0].gain, 0.75);
  EXPECT_EQ(relative[3].gain, -0.5);
  EXPECT_THAT(rows(top_rows_absolute(rtn, gptq, 2)), ElementsAre(1, 4));
  EXPECT_THAT(rows(top_rows_relative(rtn, gptq, 1)), ElementsAre(0));
}

// Every figure against its definition in float64. The Hessians of compare() are float32, sums of 30 and 200 products:
// 1e-5 is above their rounding (2^-24 * 200) and far below the effect of a wrong term.
TEST(Comparison, FiguresAreWhatTheirDefinitionsSay) {
  const Problem problem = small_problem();
  const GptqOptions options;
  const Comparison result = compared(problem, options);
  const QuantizedWeight nearest = rtn(problem.weight, options);
  const at::Tensor accumulated = [&] {
    HessianAccumulator accumulator(80);
    accumulator.update(problem.inputs);
    return accumulator.hessian();
  }();
  const GptqResult corrected = gptq(problem.weight, accumulated, options);
  const at::Tensor value_rtn = dequantize(nearest.codes, nearest.scales, nearest.zero_points, options.group_size);
  const at::Tensor value_gptq =
      dequantize(corrected.codes, corrected.scales, corrected.zero_points, options.group_size);
  const GptqResult best = gptq(problem.weight, accumulated, options_of(Preset::kBest));
  const at::Tensor value_best = dequantize(best.codes, best.scales, best.zero_points, options.group_size);

  const at::Tensor hessian = hessian64(problem.inputs, options.ridge);
  const at::Tensor fresh = hessian64(*problem.fresh_inputs, 0.0);
  const auto expect_close = [](double actual, double expected) {
    EXPECT_NEAR(actual, expected, 1e-5 * std::abs(expected));
  };
  expect_close(result.rtn.loss, loss_of(problem.weight, value_rtn, hessian));
  expect_close(result.gptq.loss, loss_of(problem.weight, value_gptq, hessian));
  expect_close(result.best.loss, loss_of(problem.weight, value_best, hessian));
  expect_close(result.rtn.fresh_loss.value(), loss_of(problem.weight, value_rtn, fresh));
  expect_close(result.best.fresh_loss.value(), loss_of(problem.weight, value_best, fresh));
  expect_close(result.gptq.fresh_loss.value(), loss_of(problem.weight, value_gptq, fresh));
  expect_close(result.ridge_added, 0.01 * hessian64(problem.inputs, 0.0).diagonal().mean().item<double>());
  double worst = 0.0;
  double worst_best = 0.0;
  for (int64_t row = 0; row < 48; ++row) {
    const at::Tensor w = problem.weight.narrow(0, row, 1);
    const double loss = loss_of(w, value_rtn.narrow(0, row, 1), hessian);
    expect_close(result.rtn.row_loss.at(static_cast<std::size_t>(row)), loss);
    const double loss_best = loss_of(w, value_best.narrow(0, row, 1), hessian);
    expect_close(result.best.row_loss.at(static_cast<std::size_t>(row)), loss_best);
    const double energy = loss_of(w, at::zeros({1, 80}), hessian);
    worst = std::max(worst, loss / energy);
    worst_best = std::max(worst_best, loss_best / energy);
  }
  expect_close(result.rtn.worst_row_perplexity_proxy.value(), std::exp(worst));
  expect_close(result.best.worst_row_perplexity_proxy.value(), std::exp(worst_best));

  EXPECT_EQ(result.n_grid_changes, nearest.codes.ne(corrected.codes).sum().item<int64_t>());
  EXPECT_GT(result.n_grid_changes, 0);
  EXPECT_EQ(result.grid_change_share, static_cast<double>(result.n_grid_changes) / (48 * 80));
  EXPECT_EQ(result.gptq.codes_sha256, sha256(corrected.codes.contiguous().const_data_ptr(), corrected.codes.nbytes()));
  EXPECT_EQ(result.best.codes_sha256, sha256(best.codes.contiguous().const_data_ptr(), best.codes.nbytes()));
  EXPECT_TRUE(at::equal(result.quantized.codes, corrected.codes));
  EXPECT_TRUE(at::equal(result.quantized.scales, corrected.scales));
  EXPECT_NE(result.rtn.codes_sha256, result.gptq.codes_sha256);
  EXPECT_NE(result.best.codes_sha256, result.gptq.codes_sha256);
  EXPECT_EQ(result.rtn.row_loss.size(), 48U);
  EXPECT_EQ(result.top_rows_absolute.size(), 10U);
  EXPECT_LT(result.gptq.loss, result.rtn.loss);
  EXPECT_LT(result.best.loss, result.gptq.loss);
  EXPECT_LE(result.rows_improved, 48);
  EXPECT_GE(result.rows_improved, 40);
  EXPECT_FALSE(result.check.has_value());
}

TEST(Comparison, ThreadsDoNotChangeAFigure) {
  const int before = at::get_num_threads();
  const Problem problem =
      draw_problem({.rows = 200, .columns = 256, .tokens = 64, .fresh_tokens = 1000}, Distribution::kCauchy);
  std::vector<Comparison> results;
  for (const int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    results.push_back(compared(problem));
  }
  at::set_num_threads(before);
  for (const Comparison& result : results) {
    EXPECT_EQ(result.rtn.row_loss, results[0].rtn.row_loss);
    EXPECT_EQ(result.gptq.row_loss, results[0].gptq.row_loss);
    EXPECT_EQ(result.gptq.loss, results[0].gptq.loss);
    EXPECT_EQ(result.gptq.fresh_loss, results[0].gptq.fresh_loss);
    EXPECT_EQ(result.gptq.codes_sha256, results[0].gptq.codes_sha256);
    EXPECT_EQ(result.best.row_loss, results[0].best.row_loss);
    EXPECT_EQ(result.best.fresh_loss, results[0].best.fresh_loss);
    EXPECT_EQ(result.best.codes_sha256, results[0].best.codes_sha256);
    EXPECT_EQ(result.ridge_added, results[0].ridge_added);
  }
}

// The inputs are the unit vectors: H = I / K, so GPTQ has nothing to correct.
TEST(Comparison, UncorrelatedInputsGiveRtn) {
  Problem problem = small_problem();
  problem.inputs = at::eye(80);
  const Comparison result = compared(problem);
  EXPECT_EQ(result.n_grid_changes, 0);
  EXPECT_EQ(result.grid_change_share, 0.0);
  EXPECT_EQ(result.gptq.codes_sha256, result.rtn.codes_sha256);
  EXPECT_EQ(result.gptq.row_loss, result.rtn.row_loss);
  EXPECT_EQ(result.rows_improved, 0);
}

// The figures of a half-precision weight are those of its codes and its stored scales; nothing else is rounded.
TEST(Comparison, HalfPrecisionWeights) {
  Problem problem = small_problem();
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    problem.weight = small_problem().weight.to(dtype);
    const QuantizedWeight nearest = rtn(problem.weight, {});
    EXPECT_EQ(nearest.scales.scalar_type(), dtype);
    const at::Tensor value = dequantize(nearest.codes, nearest.scales.to(at::kDouble), nearest.zero_points, 64);
    const double expected = loss_of(problem.weight, value, hessian64(problem.inputs, 0.01));
    const Comparison result = compared(problem);
    EXPECT_NEAR(result.rtn.loss, expected, 1e-5 * expected);
    EXPECT_LT(result.gptq.loss, result.rtn.loss);
  }
}

TEST(Comparison, Float64IsComputedInFloat64) {
  Problem problem = small_problem();
  problem.weight = problem.weight.to(at::kDouble);
  const Comparison result = compared(problem);
  const QuantizedWeight nearest = rtn(problem.weight, {});
  const at::Tensor value = dequantize(nearest.codes, nearest.scales, nearest.zero_points, 64);
  const double expected = loss_of(problem.weight, value, hessian64(problem.inputs, 0.01));
  EXPECT_NEAR(result.rtn.loss, expected, 1e-12 * expected);
}

TEST(Comparison, WithoutFreshInputs) {
  Problem problem = small_problem();
  problem.fresh_inputs.reset();
  const Comparison result = compared(problem);
  EXPECT_EQ(result.rtn.fresh_loss, std::nullopt);
  EXPECT_EQ(result.gptq.fresh_loss, std::nullopt);
  EXPECT_EQ(result.best.fresh_loss, std::nullopt);
}

TEST(Comparison, AWeightOfZerosHasNoLoss) {
  Problem problem = small_problem();
  problem.weight = at::zeros({48, 80});
  const Comparison result = compared(problem);
  EXPECT_EQ(result.rtn.loss, 0.0);
  EXPECT_EQ(result.gptq.loss, 0.0);
  EXPECT_EQ(result.best.loss, 0.0);
  EXPECT_EQ(result.rtn.worst_row_perplexity_proxy, std::nullopt);
  EXPECT_TRUE(result.top_rows_relative.empty());
}

TEST(Comparison, StagesAreCounted) {
  for (const bool fresh : {true, false}) {
    for (const bool check : {true, false}) {
      Problem problem = small_problem();
      if (!fresh) problem.fresh_inputs.reset();
      Stages stages = quiet_stages();
      Options options;
      options.check = check;
      static_cast<void>(compare(problem, options, stages));
      EXPECT_EQ(stages.seconds().size(), stage_count(problem, options));
    }
  }
}

TEST(Comparison, CheckComparesWithTheReference) {
  for (const Distribution distribution : {Distribution::kNormal, Distribution::kCauchy}) {
    const Comparison result = compared(small_problem(distribution), {}, true);
    ASSERT_TRUE(result.check.has_value());
    EXPECT_TRUE(result.check->passed);
    ASSERT_EQ(result.check->agreements.size(), 3U);
    EXPECT_EQ(result.check->agreements[0].differing_codes, 0);
    EXPECT_EQ(result.check->agreements[0].differing_rows, 0);
    EXPECT_LT(result.check->agreements[0].loss_difference, 1e-9);
    EXPECT_LT(result.check->agreements[0].largest_row_loss_difference, 1e-9);
  }
  Problem problem = small_problem();
  problem.weight = problem.weight.to(at::kDouble);
  EXPECT_EQ(compared(problem, {}, true).check->agreements.size(), 1U);
}

// The ridge that the library chooses, for both schemes. The figures are those of the same ridge given as a number.
TEST(Comparison, ARidgeFromTheDataIsOneForTheRun) {
  Problem problem = small_problem();
  problem.inputs = at::cumsum(problem.inputs, 1);  // correlated, so a ridge matters
  problem.fresh_inputs = at::cumsum(*problem.fresh_inputs, 1);
  Options options;
  options.gptq.bits = 3;
  options.gptq.ridge = 0.5;
  options.best = preset_on_terms(Preset::kBest, options.gptq);
  options.ridge_from_data = true;
  options.check = true;
  const Comparison result = compared(problem, options);

  HessianAccumulator accumulator(80, at::kFloat, Halves::kApart);
  accumulator.update(problem.inputs);
  const RidgeChoice choice = choose_ridge(problem.weight, accumulator, options.gptq);
  ASSERT_TRUE(result.ridge_choice.has_value());
  EXPECT_EQ(result.ridge_choice->choice.ridge, choice.ridge);
  EXPECT_EQ(result.ridge_choice->choice.ridges, choice.ridges);
  EXPECT_EQ(result.ridge_choice->choice.held_out, choice.held_out);
  EXPECT_THAT(result.ridge_choice->half_tokens, ElementsAre(15, 15));
  EXPECT_TRUE(result.ridge_choice->failed.empty());
  EXPECT_FALSE(result.ridge_choice->rounds_to_nearest());
  EXPECT_EQ(result.ridge, choice.ridge);
  EXPECT_NE(result.ridge, 0.5);

  options.ridge_from_data = false;
  options.gptq.ridge = choice.ridge;
  const Comparison given = compared(problem, options);
  EXPECT_FALSE(given.ridge_choice.has_value());
  EXPECT_EQ(given.ridge, choice.ridge);
  // The sums of the two halves are added last, so H differs in its last bits.
  EXPECT_NEAR(result.ridge_added, given.ridge_added, 1e-5 * given.ridge_added);
  EXPECT_NEAR(result.rtn.loss, given.rtn.loss, 1e-5 * given.rtn.loss);
  EXPECT_NEAR(result.gptq.loss, given.gptq.loss, 0.02 * given.gptq.loss);
  EXPECT_NEAR(result.best.loss, given.best.loss, 0.02 * given.best.loss);
  EXPECT_TRUE(result.check.value().passed);
}

TEST(Comparison, ARidgeFromTheDataWantsATokenInEitherHalf) {
  Problem problem = small_problem();
  Options options;
  options.ridge_from_data = true;
  problem.inputs = problem.inputs.narrow(0, 0, 2);
  EXPECT_THAT(compared(problem, options).ridge_choice.value().half_tokens, ElementsAre(1, 1));
  problem.inputs = problem.inputs.narrow(0, 0, 1);
  Stages stages = quiet_stages();
  EXPECT_THROW(static_cast<void>(compare(problem, options, stages)), InputError);
  EXPECT_TRUE(stages.seconds().empty());
}

// The lab against the figures of a float64 computation (docs/driver.md explains the figures).
TEST(Comparison, TheLab) {
  const Comparison normal = compared(draw_problem({}, Distribution::kNormal));
  EXPECT_NEAR(normal.rtn.loss, 2.766669, 0.01 * 2.766669);
  EXPECT_NEAR(normal.gptq.loss, 0.303847, 0.01 * 0.303847);
  EXPECT_NEAR(normal.grid_change_share, 0.16087, 0.01 * 0.16087);
  EXPECT_NEAR(normal.rtn.fresh_loss.value(), 2.7304, 0.01 * 2.7304);
  EXPECT_NEAR(normal.gptq.fresh_loss.value(), 5.1410, 0.01 * 5.1410);
  const Comparison cauchy = compared(draw_problem({}, Distribution::kCauchy));
  EXPECT_NEAR(cauchy.rtn.loss, 105127.2, 0.01 * 105127.2);
  EXPECT_NEAR(cauchy.gptq.loss, 39725.6, 0.01 * 39725.6);
  EXPECT_NEAR(cauchy.grid_change_share, 0.265, 0.01 * 0.265);
}

}  // namespace
}  // namespace miniquant::driver
