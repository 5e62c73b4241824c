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

/// The figures of one quantization scheme on a layer.
struct SchemeFigures {
  std::vector<double> row_loss;      ///< [N]: e H e^T, H of the calibration inputs with its ridge
  double loss = 0.0;                 ///< their sum
  std::optional<double> fresh_loss;  ///< sum over rows of e H e^T, H of the fresh inputs without a ridge
  /// exp of the worst row's relative output error, see worst_row_perplexity_proxy().
  std::optional<double> worst_row_perplexity_proxy;
  std::string codes_sha256;  ///< of the int8 codes [N, K], row-major
};

/// A row, and the gain of GPTQ on it.
struct RowGain {
  int64_t row = 0;
  double loss_rtn = 0.0;
  double loss_gptq = 0.0;
  double gain = 0.0;
};

/// One line of --check: two implementations compared on the same layer.
struct Agreement {
  std::string name;  ///< the two implementations
  int64_t differing_codes = 0;
  int64_t differing_rows = 0;
  double largest_row_loss_difference = 0.0;  ///< relative, max over rows
  double loss_difference = 0.0;              ///< relative, of the layer
};

struct CheckFigures {
  std::vector<Agreement> agreements;
  /// The float64 losses of the layer differ by at most kMaxLossDifference.
  bool passed = false;
};

/// In float64 the two implementations differ where a target lies within about 1e-13 of a rounding tie. A tie changes
/// the later codes of its row, and the loss of the row by a few percent; an error in either implementation changes
/// every row.
inline constexpr double kMaxLossDifference = 1e-3;

/// How the ridge was chosen from the calibration tokens.
struct RidgeFigures {
  RidgeChoice choice;
  std::array<int64_t, 2> half_tokens = {0, 0};  ///< calibration tokens of each half; each quantizes for the other
  std::vector<double> failed;                   ///< the ridges, ascending, with which H was not positive definite
  /// Whether the choice is the last of its ridges: no other was better than rounding to nearest.
  [[nodiscard]] bool rounds_to_nearest() const { return choice.ridge == choice.ridges.back(); }
};

/// RTN, GPTQ and GPTQ with the best preset side by side on one layer.
struct Comparison {
  SchemeFigures rtn;
  SchemeFigures gptq;
  SchemeFigures best;
  double ridge = 0.0;                        ///< of H, the same for every scheme
  double ridge_added = 0.0;                  ///< ridge * mean(diag H), what was added to the diagonal
  std::optional<RidgeFigures> ridge_choice;  ///< if the ridge is from the data
  int64_t n_grid_changes = 0;
  double grid_change_share = 0.0;
  int64_t rows_improved = 0;  ///< rows whose loss is lower with GPTQ
  std::vector<RowGain> top_rows_absolute;
  std::vector<RowGain> top_rows_relative;
  std::optional<CheckFigures> check;
  GptqResult quantized;  ///< by GPTQ
};

/// The options of RTN in a run with these options of GPTQ: the plain grid of the same bits, group size and symmetry.
[[nodiscard]] GridOptions rtn_options(const GptqOptions& gptq);

/// a / b; nullopt if b is 0.
[[nodiscard]] std::optional<double> ratio(double a, double b);

/// The same for figures that may be missing; nullopt if one is.
[[nodiscard]] std::optional<double> ratio(const std::optional<double>& a, const std::optional<double>& b);

/// mean(diag H), summed in float64 in stored order.
[[nodiscard]] double mean_diagonal(const at::Tensor& hessian);

/// exp(max over rows of loss_r / energy_r), where energy_r = w_r H w_r^T is the energy of the row's output. Rows
/// without energy have no error and are left out; nullopt if no row is left or exp overflows.
[[nodiscard]] std::optional<double> worst_row_perplexity_proxy(const std::vector<double>& row_loss,
                                                               const std::vector<double>& row_energy);

/// The `count` rows with the largest gain of GPTQ, largest first, ties in row order; by loss_rtn - loss_gptq, ...
[[nodiscard]] std::vector<RowGain> top_rows_absolute(const std::vector<double>& loss_rtn,
                                                     const std::vector<double>& loss_gptq, std::size_t count);
/// ... or by 1 - loss_gptq / loss_rtn, among rows where RTN has a loss above 0.
[[nodiscard]] std::vector<RowGain> top_rows_relative(const std::vector<double>& loss_rtn,
                                                     const std::vector<double>& loss_gptq, std::size_t count);

/// The number of stages that compare() runs.
[[nodiscard]] std::size_t stage_count(const Problem& problem, const Options& options);

/// Quantizes the layer with the three schemes, and measures each on the calibration inputs and the fresh inputs.
///
/// A ridge from the data is chosen once: it depends on the weight, the inputs and the grid's bits, group size and
/// symmetry, which GPTQ and best share, and one H measures all three schemes.
///
/// Throws InputError before any other work if the inputs do not suit the options: see check_inputs().
///
/// Computes in float64 for a float64 weight, otherwise in float32 (losses accumulate in float64). Every figure is the
/// same for any number of threads.
[[nodiscard]] Comparison compare(const Problem& problem, const Options& options, Stages& stages);

}  // namespace miniquant::driver
