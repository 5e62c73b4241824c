#include "driver/comparison.h"

#include <ATen/ops/zeros_like.h>
#include <miniquant/miniquant.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include "driver/error.h"
#include "driver/sha256.h"

namespace miniquant::driver {
namespace {

constexpr std::size_t kTopRows = 10;

at::ScalarType compute_type(const at::Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::vector<double> to_vector(const at::Tensor& values) {
  const at::Tensor contiguous = values.to(at::kDouble).contiguous();
  const auto* first = contiguous.const_data_ptr<double>();
  return {first, first + contiguous.numel()};
}

// In row order, so that the sum does not depend on the number of threads.
double sum(const std::vector<double>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

at::Tensor hessian_of(const at::Tensor& inputs, HessianAccumulator& accumulator) {
  accumulator.update(inputs);
  return accumulator.hessian();
}

// GPTQ with the ridge of the options, or with one from the data, which is put in its place.
GptqResult quantize(const at::Tensor& weight, const HessianAccumulator& accumulator, const at::Tensor& hessian,
                    bool ridge_from_data, GptqOptions& options, std::optional<RidgeFigures>& ridge_choice) {
  if (!ridge_from_data) return gptq(weight, hessian, options);
  AutoGptqResult automatic = gptq_auto(weight, accumulator, options);
  options.ridge = automatic.ridge;
  ridge_choice = RidgeFigures{.choice = std::move(automatic.choice),
                              .half_tokens = {accumulator.half_tokens(0), accumulator.half_tokens(1)},
                              .failed = std::move(automatic.failed)};
  return static_cast<const GptqResult&>(automatic);
}

// What codes and scales stand for, without rounding it to a half-precision weight's dtype.
at::Tensor value_of(const QuantizedWeight& quantized, int64_t group_size, at::ScalarType dtype) {
  return dequantize(quantized.codes, quantized.scales.to(dtype), quantized.zero_points, group_size);
}

std::string codes_sha256(const at::Tensor& codes) {
  const at::Tensor contiguous = codes.contiguous();
  return sha256(contiguous.const_data_ptr(), contiguous.nbytes());
}

struct CodeDifferences {
  int64_t codes = 0;
  int64_t rows = 0;
};

CodeDifferences count_differences(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor per_row = a.ne(b).sum(/*dim=*/1);
  return {.codes = per_row.sum().item<int64_t>(), .rows = per_row.ne(0).sum().item<int64_t>()};
}

double relative_difference(double a, double b) {
  const double scale = std::max(std::abs(a), std::abs(b));
  return scale == 0.0 ? 0.0 : std::abs(a - b) / scale;
}

Agreement agreement_of(std::string name, const GptqResult& a, const GptqResult& b) {
  const CodeDifferences differences = count_differences(a.codes, b.codes);
  const std::vector<double> loss_a = to_vector(a.row_loss);
  const std::vector<double> loss_b = to_vector(b.row_loss);
  Agreement agreement{
      .name = std::move(name), .differing_codes = differences.codes, .differing_rows = differences.rows};
  for (std::size_t row = 0; row < loss_a.size(); ++row) {
    agreement.largest_row_loss_difference =
        std::max(agreement.largest_row_loss_difference, relative_difference(loss_a[row], loss_b[row]));
  }
  agreement.loss_difference = relative_difference(sum(loss_a), sum(loss_b));
  return agreement;
}

// Both implementations in float64, where they have to agree, and in the dtype the figures are computed in.
CheckFigures run_check(const Problem& problem, const at::Tensor& hessian, const GptqOptions& options) {
  const at::ScalarType dtype = compute_type(problem.weight);
  const at::Tensor weight64 = problem.weight.to(at::kDouble);
  const at::Tensor hessian64 = hessian.to(at::kDouble);
  const GptqResult reference64 = gptq_reference(weight64, hessian64, options);
  CheckFigures check;
  check.agreements.push_back(
      agreement_of("float64: gptq, gptq_reference", gptq(weight64, hessian64, options), reference64));
  check.passed = check.agreements.front().loss_difference <= kMaxLossDifference;
  if (dtype == at::kFloat) {
    const at::Tensor weight32 = problem.weight.to(at::kFloat);
    const GptqResult fast32 = gptq(weight32, hessian, options);
    check.agreements.push_back(
        agreement_of("float32: gptq, gptq_reference", fast32, gptq_reference(weight32, hessian, options)));
    check.agreements.push_back(agreement_of("float32 gptq, float64 gptq_reference", fast32, reference64));
  }
  return check;
}

std::vector<RowGain> first_rows(std::vector<RowGain> gains, std::size_t count) {
  const std::size_t kept = std::min(count, gains.size());
  std::ranges::sort(
      gains, [](const RowGain& a, const RowGain& b) { return a.gain != b.gain ? a.gain > b.gain : a.row < b.row; });
  gains.resize(kept);
  return gains;
}

}  // namespace

GridOptions rtn_options(const GptqOptions& gptq) {
  GridOptions options;
  options.bits = gptq.bits;
  options.group_size = gptq.group_size;
  options.symmetric = gptq.symmetric;
  return options;
}

GptqOptions best_options(const GptqOptions& gptq) { return preset_on_terms(Preset::kBest, gptq); }

std::optional<double> ratio(double a, double b) { return b == 0.0 ? std::nullopt : std::optional<double>(a / b); }

std::optional<double> ratio(const std::optional<double>& a, const std::optional<double>& b) {
  return a && b ? ratio(*a, *b) : std::nullopt;
}

double mean_diagonal(const at::Tensor& hessian) {
  const std::vector<double> diagonal = to_vector(hessian.diagonal());
  return sum(diagonal) / static_cast<double>(diagonal.size());
}

std::optional<double> worst_row_perplexity_proxy(const std::vector<double>& row_loss,
                                                 const std::vector<double>& row_energy) {
  std::optional<double> worst;
  for (std::size_t row = 0; row < row_loss.size(); ++row) {
    const std::optional<double> relative = ratio(row_loss[row], row_energy[row]);
    if (relative && (!worst || *relative > *worst)) worst = relative;
  }
  if (!worst || !std::isfinite(std::exp(*worst))) return std::nullopt;
  return std::exp(*worst);
}

std::vector<RowGain> top_rows_absolute(const std::vector<double>& loss_rtn, const std::vector<double>& loss_gptq,
                                       std::size_t count) {
  std::vector<RowGain> gains;
  gains.reserve(loss_rtn.size());
  for (std::size_t row = 0; row < loss_rtn.size(); ++row) {
    gains.push_back({.row = static_cast<int64_t>(row),
                     .loss_rtn = loss_rtn[row],
                     .loss_gptq = loss_gptq[row],
                     .gain = loss_rtn[row] - loss_gptq[row]});
  }
  return first_rows(std::move(gains), count);
}

std::vector<RowGain> top_rows_relative(const std::vector<double>& loss_rtn, const std::vector<double>& loss_gptq,
                                       std::size_t count) {
  std::vector<RowGain> gains;
  gains.reserve(loss_rtn.size());
  for (std::size_t row = 0; row < loss_rtn.size(); ++row) {
    const std::optional<double> left = ratio(loss_gptq[row], loss_rtn[row]);
    if (!left) continue;
    gains.push_back({.row = static_cast<int64_t>(row),
                     .loss_rtn = loss_rtn[row],
                     .loss_gptq = loss_gptq[row],
                     .gain = 1.0 - *left});
  }
  return first_rows(std::move(gains), count);
}

std::size_t stage_count(const Problem& problem, bool check) {
  return 5U + (problem.fresh_inputs ? 2U : 0U) + (check ? 1U : 0U);
}

Comparison compare(const Problem& problem, const Options& options, Stages& stages) {
  if (options.ridge_from_data && problem.inputs.size(0) < 2) {
    throw InputError("--ridge: expected at least 2 calibration tokens with auto, which judges by halves, but got " +
                     std::to_string(problem.inputs.size(0)));
  }
  const at::ScalarType dtype = compute_type(problem.weight);
  const at::Tensor weight = problem.weight.to(dtype);
  HessianAccumulator accumulator(weight.size(1), dtype, options.ridge_from_data ? Halves::kApart : Halves::kTogether);
  GptqOptions used = options.gptq;
  Comparison result;

  const at::Tensor hessian = stages.run("hessian", [&] { return hessian_of(problem.inputs, accumulator); });
  const QuantizedWeight nearest = stages.run("rtn", [&] { return rtn(problem.weight, rtn_options(used)); });
  const GptqResult corrected = stages.run("gptq", [&] {
    return quantize(problem.weight, accumulator, hessian, options.ridge_from_data, used, result.ridge_choice);
  });
  const GptqResult best = stages.run("best", [&] { return gptq(problem.weight, hessian, best_options(used)); });

  struct Scheme {
    SchemeFigures& figures;
    at::Tensor codes;
    at::Tensor value;
  };
  const auto scheme = [&](SchemeFigures& figures, const QuantizedWeight& quantized) {
    return Scheme{.figures = figures, .codes = quantized.codes, .value = value_of(quantized, used.group_size, dtype)};
  };
  const std::array<Scheme, 3> schemes = {scheme(result.rtn, nearest), scheme(result.gptq, corrected),
                                         scheme(result.best, best)};
  result.ridge = used.ridge;
  result.ridge_added = used.ridge * mean_diagonal(hessian);
  const at::Tensor hessian_damped = hessian.clone();
  hessian_damped.diagonal().add_(result.ridge_added);
  const std::vector<double> row_energy = stages.run("loss", [&] {
    for (const Scheme& s : schemes) {
      s.figures.row_loss = to_vector(quantization_loss(weight, s.value, hessian_damped));
    }
    return to_vector(quantization_loss(weight, at::zeros_like(weight), hessian_damped));
  });
  for (const Scheme& s : schemes) {
    s.figures.loss = sum(s.figures.row_loss);
    s.figures.worst_row_perplexity_proxy = worst_row_perplexity_proxy(s.figures.row_loss, row_energy);
    s.figures.codes_sha256 = codes_sha256(s.codes);
  }

  if (problem.fresh_inputs) {
    const at::Tensor fresh = stages.run("fresh_hessian", [&] {
      HessianAccumulator fresh_accumulator(weight.size(1), dtype);
      return hessian_of(*problem.fresh_inputs, fresh_accumulator);
    });
    const std::vector<double> losses = stages.run("fresh_loss", [&] {
      std::vector<double> list;
      list.reserve(schemes.size());
      for (const Scheme& s : schemes) list.push_back(sum(to_vector(quantization_loss(weight, s.value, fresh))));
      return list;
    });
    for (std::size_t i = 0; i < schemes.size(); ++i) schemes[i].figures.fresh_loss = losses[i];
  }

  result.n_grid_changes = count_differences(nearest.codes, corrected.codes).codes;
  result.grid_change_share = static_cast<double>(result.n_grid_changes) / static_cast<double>(weight.numel());
  for (std::size_t row = 0; row < result.rtn.row_loss.size(); ++row) {
    if (result.gptq.row_loss[row] < result.rtn.row_loss[row]) ++result.rows_improved;
  }
  result.top_rows_absolute = top_rows_absolute(result.rtn.row_loss, result.gptq.row_loss, kTopRows);
  result.top_rows_relative = top_rows_relative(result.rtn.row_loss, result.gptq.row_loss, kTopRows);

  if (options.check) result.check = stages.run("check", [&] { return run_check(problem, hessian, used); });
  return result;
}

}  // namespace miniquant::driver
