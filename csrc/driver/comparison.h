#pragma once

#include <ATen/core/Tensor.h>
#include <miniquant/gptq.h>
#include <miniquant/grid.h>
#include <miniquant/ridge.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "driver/problem.h"
#include "driver/progress.h"

namespace miniquant::driver {

/// What one way of quantizing gives on a layer.
struct SchemeFigures {
  std::vector<double> row_loss;      ///< [N]: e H e^T, H of the calibration inputs with its ridge
  double loss = 0.0;                 ///< their sum
  std::optional<double> fresh_loss;  ///< sum over rows of e H e^T, H of the fresh inputs without a ridge
  /// exp of the worst row's relative output error, see worst_row_perplexity_proxy().
  std::optional<double> worst_row_perplexity_proxy;
  std::string codes_sha256;  ///< of the int8 codes [N, K], row-major
};

/// A row and what GPTQ gained on it.
struct RowGain {
  int64_t row = 0;
  double loss_rtn = 0.0;
  double loss_gptq = 0.0;
  double gain = 0.0;
};

/// One line of --check: two ways to the same codes.
struct Agreement {
  std::string name;  ///< what is compared
  int64_t differing_codes = 0;
  int64_t differing_rows = 0;
  double largest_row_loss_difference = 0.0;  ///< relative, over rows
  double loss_difference = 0.0;              ///< relative, of the layer
};

struct CheckFigures {
  std::vector<Agreement> agreements;
  /// The float64 losses of the layer agree to kMaxLossDifference.
  bool passed = false;
};

/// In float64 the two implementations differ where a target lies on a rounding tie to 1e-13 or so, which changes the
/// codes of that row from there on, and its loss by some percent. An error in either changes every row.
inline constexpr double kMaxLossDifference = 1e-3;

/// How a ridge was found in the calibration tokens.
struct RidgeFigures {
  RidgeChoice choice;
  std::array<int64_t, 2> half_tokens = {0, 0};  ///< calibration tokens that quantized for the others and measured them
  std::vector<double> failed;                   ///< ridges, ascending, with which H was not positive definite
  /// The choice is the last of its ridges: no other did better than rounding to nearest.
  [[nodiscard]] bool rounds_to_nearest() const { return choice.ridge == choice.ridges.back(); }
};

/// RTN, GPTQ and GPTQ with the best preset side by side on one layer.
struct Comparison {
  SchemeFigures rtn;
  SchemeFigures gptq;
  SchemeFigures best;
  double ridge = 0.0;                        ///< of H, the same for every scheme
  double ridge_added = 0.0;                  ///< ridge * mean(diag H), what was added to the diagonal
  std::optional<RidgeFigures> ridge_choice;  ///< where the ridge is from the data
  int64_t n_grid_changes = 0;
  double grid_change_share = 0.0;
  int64_t rows_improved = 0;  ///< rows whose loss is lower with GPTQ
  std::vector<RowGain> top_rows_absolute;
  std::vector<RowGain> top_rows_relative;
  std::optional<CheckFigures> check;
  GptqResult quantized;  ///< by GPTQ
};

/// What RTN rounds to in a run whose GPTQ has these options: the plain grid of the same bits, group size and symmetry.
[[nodiscard]] GridOptions rtn_options(const GptqOptions& gptq);

/// a / b, or nothing where b is 0.
[[nodiscard]] std::optional<double> ratio(double a, double b);

/// The same of figures that may be missing; nothing where one is.
[[nodiscard]] std::optional<double> ratio(const std::optional<double>& a, const std::optional<double>& b);

/// mean(diag H), summed in float64 in stored order.
[[nodiscard]] double mean_diagonal(const at::Tensor& hessian);

/// exp(max over rows of loss_r / energy_r), where energy_r = w_r H w_r^T is what the row's output has in the first
/// place. A row without energy has no error and is left out; nothing where no row is left or exp overflows.
[[nodiscard]] std::optional<double> worst_row_perplexity_proxy(const std::vector<double>& row_loss,
                                                               const std::vector<double>& row_energy);

/// The `count` rows on which GPTQ gains most, most first, ties in row order: by loss_rtn - loss_gptq, ...
[[nodiscard]] std::vector<RowGain> top_rows_absolute(const std::vector<double>& loss_rtn,
                                                     const std::vector<double>& loss_gptq, std::size_t count);
/// ... or by 1 - loss_gptq / loss_rtn, among rows where RTN has a loss.
[[nodiscard]] std::vector<RowGain> top_rows_relative(const std::vector<double>& loss_rtn,
                                                     const std::vector<double>& loss_gptq, std::size_t count);

/// The number of stages that compare() runs.
[[nodiscard]] std::size_t stage_count(const Problem& problem, const Options& options);

/// Quantizes the layer in all three ways and judges each on its calibration and its fresh inputs.
///
/// A ridge from the data is chosen once: it depends on the weight, the inputs and the grid's bits, group size and
/// symmetry, which GPTQ and best share, and one H measures all three ways.
///
/// Before any other work: InputError where the inputs do not suit the options, see check_inputs().
///
/// Computes in float64 for a float64 weight, else in float32 (losses accumulate in float64); every figure is the same
/// for any number of threads.
[[nodiscard]] Comparison compare(const Problem& problem, const Options& options, Stages& stages);

}  // namespace miniquant::driver
