#include "driver/comparison.h"

#include <ATen/ops/zeros_like.h>
#include <miniquant/miniquant.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>

#include "driver/inputs.h"
#include "driver/sha256.h"

namespace miniquant::driver {
namespace {

constexpr std::size_t kTopRows = 10;

std::vector<double> to_vector(const at::Tensor& values) {
  const at::Tensor contiguous = values.to(at::kDouble).contiguous();
  const auto* first = contiguous.const_data_ptr<double>();
  return {first, first + contiguous.numel()};
}

// In row order, so the sum does not depend on the number of threads.
double sum(const std::vector<double>& values) { return std::accumulate(values.begin(), values.end(), 0.0); }

at::Tensor hessian_of(const at::Tensor& inputs, HessianAccumulator& accumulator) {
  accumulator.update(inputs);
  return accumulator.hessian();
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

// Compares the implementations in float64, where they must agree, and in the dtype of the figures.
CheckFigures run_check(const Problem& problem, const at::Tensor& hessian, const GptqOptions& options) {
  const at::ScalarType dtype = compute_type(problem.weight.scalar_type());
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

namespace {

// A comparison as a list of stages. Each stage reads the results of earlier ones; the figures are complete after the
// last.
class Comparer {
 public:
  struct Stage {
    std::string name;
    std::function<void()> work;
  };

  Comparer(const Problem& problem, const Options& options)
      : problem_(problem),
        options_(options),
        dtype_(compute_type(problem.weight.scalar_type())),
        used_(options.gptq),
        accumulator_(problem.weight.size(1), dtype_, options.ridge_from_data ? Halves::kApart : Halves::kTogether) {}
  Comparer(const Comparer&) = delete;
  Comparer& operator=(const Comparer&) = delete;

  [[nodiscard]] std::vector<Stage> stages() {
    std::vector<Stage> list = {{"hessian", [this] { hessian_ = hessian_of(problem_.inputs, accumulator_); }},
                               {"rtn", [this] { nearest_ = rtn(problem_.weight, rtn_options(used_)); }},
                               {"gptq", [this] { quantize(); }},
                               {"best", [this] { quantize_best(); }},
                               {"loss", [this] { measure(); }}};
    if (problem_.fresh_inputs) {
      list.push_back({"fresh_hessian", [this, inputs = *problem_.fresh_inputs] { sum_fresh_inputs(inputs); }});
      list.push_back({"fresh_loss", [this] { measure_on_fresh_inputs(); }});
    }
    if (options_.check) {
      list.push_back({"check", [this] { result_.check = run_check(problem_, hessian_, used_); }});
    }
    return list;
  }

  // The results of the stages, and the figures derived from them.
  [[nodiscard]] Comparison take() {
    result_.n_grid_changes = count_differences(nearest_.codes, corrected_.codes).codes;
    result_.grid_change_share =
        static_cast<double>(result_.n_grid_changes) / static_cast<double>(problem_.weight.numel());
    for (std::size_t row = 0; row < result_.rtn.row_loss.size(); ++row) {
      if (result_.gptq.row_loss[row] < result_.rtn.row_loss[row]) ++result_.rows_improved;
    }
    result_.top_rows_absolute = top_rows_absolute(result_.rtn.row_loss, result_.gptq.row_loss, kTopRows);
    result_.top_rows_relative = top_rows_relative(result_.rtn.row_loss, result_.gptq.row_loss, kTopRows);
    result_.quantized = std::move(corrected_);
    return std::move(result_);
  }

 private:
  struct Scheme {
    SchemeFigures* figures;
    at::Tensor codes;
    at::Tensor value;  ///< dequantized codes [N, K] with the stored scales, not rounded to the weight's dtype
  };

  // GPTQ with the ridge of the options, or with one from the data, which then replaces it.
  void quantize() {
    if (!options_.ridge_from_data) {
      corrected_ = gptq(problem_.weight, hessian_, used_);
      return;
    }
    AutoGptqResult automatic = gptq_auto(problem_.weight, accumulator_, used_);
    used_.ridge = automatic.ridge;
    result_.ridge_choice = RidgeFigures{.choice = std::move(automatic.choice),
                                        .half_tokens = {accumulator_.half_tokens(0), accumulator_.half_tokens(1)},
                                        .failed = std::move(automatic.failed)};
    corrected_ = static_cast<const GptqResult&>(automatic);
  }

  void quantize_best() {
    GptqOptions options = options_.best;
    options.ridge = used_.ridge;
    best_ = gptq(problem_.weight, hessian_, options);
  }

  void measure() {
    const at::Tensor weight = problem_.weight.to(dtype_);
    result_.ridge = used_.ridge;
    result_.ridge_added = used_.ridge * mean_diagonal(hessian_);
    const at::Tensor damped = hessian_.clone();
    damped.diagonal().add_(result_.ridge_added);
    const std::vector<double> row_energy = to_vector(quantization_loss(weight, at::zeros_like(weight), damped));
    schemes_ = {scheme(result_.rtn, nearest_), scheme(result_.gptq, corrected_), scheme(result_.best, best_)};
    for (const Scheme& s : schemes_) {
      s.figures->row_loss = to_vector(quantization_loss(weight, s.value, damped));
      s.figures->loss = sum(s.figures->row_loss);
      s.figures->worst_row_perplexity_proxy = worst_row_perplexity_proxy(s.figures->row_loss, row_energy);
      s.figures->codes_sha256 = codes_sha256(s.codes);
    }
  }

  [[nodiscard]] Scheme scheme(SchemeFigures& figures, const QuantizedWeight& quantized) const {
    return {.figures = &figures,
            .codes = quantized.codes,
            .value = dequantize(quantized.codes, quantized.scales.to(dtype_), quantized.zero_points, used_.group_size)};
  }

  void sum_fresh_inputs(const at::Tensor& inputs) {
    HessianAccumulator accumulator(problem_.weight.size(1), dtype_);
    fresh_hessian_ = hessian_of(inputs, accumulator);
  }

  void measure_on_fresh_inputs() {
    const at::Tensor weight = problem_.weight.to(dtype_);
    for (const Scheme& s : schemes_) {
      s.figures->fresh_loss = sum(to_vector(quantization_loss(weight, s.value, fresh_hessian_)));
    }
  }

  const Problem& problem_;
  const Options& options_;
  at::ScalarType dtype_;
  GptqOptions used_;  ///< the options of the run, with the ridge used
  HessianAccumulator accumulator_;
  at::Tensor hessian_;        ///< [K, K] of the calibration inputs, without the ridge
  at::Tensor fresh_hessian_;  ///< [K, K]
  QuantizedWeight nearest_;
  GptqResult corrected_;
  GptqResult best_;
  std::vector<Scheme> schemes_;
  Comparison result_;
};

}  // namespace

std::size_t stage_count(const Problem& problem, const Options& options) {
  return Comparer(problem, options).stages().size();
}

Comparison compare(const Problem& problem, const Options& options, Stages& stages) {
  check_inputs(problem, options);
  Comparer comparer(problem, options);
  for (Comparer::Stage& stage : comparer.stages()) stages.run(std::move(stage.name), stage.work);
  return comparer.take();
}

}  // namespace miniquant::driver
