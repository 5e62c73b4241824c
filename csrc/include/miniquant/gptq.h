#pragma once

#include <miniquant/grid.h>

#include <string_view>

namespace miniquant {

/// Which weights a group's scale is taken from.
enum class GroupScales {
  kStatic,   ///< the original weights: the scales do not depend on the Hessian
  kDynamic,  ///< the weights as updated by every earlier column, at the moment the group is reached
};

/// The order in which columns are quantized. Scales stay with the stored columns in either.
enum class ColumnOrder {
  kNatural,     ///< left to right
  kActivation,  ///< descending diag(hessian), ties in stored order
  /// Whole groups by descending mean of diag(hessian), a shorter last one last. Of the columns of a group the last is
  /// that of least diag(hessian), the one before it that of least variance given the last, and so on (by descending
  /// diag(hessian) in groups of more than 512 columns).
  kGroup,
};

/// The names under which the operators know them: "static", "natural", ...
MINIQUANT_API std::string_view name_of(GroupScales group_scales);
MINIQUANT_API std::string_view name_of(ColumnOrder column_order);

/// The scales that ScaleMethod::kLoss tries; twice as many for a full range of 2 or 3 bits, one of either sign.
inline constexpr int64_t kMostBeamScales = 25;

struct GptqOptions : GridOptions {
  /// Added to the Hessian's diagonal, relative to its mean: H += ridge * mean(diag H) * I.
  double ridge = 0.01;
  /// Columns per block of the sweep. Changes the time taken, not the result.
  int64_t block_size = 128;
  /// kDynamic needs an order that reaches a group's columns together (not kActivation) and no given scales.
  GroupScales group_scales = GroupScales::kStatic;
  ColumnOrder column_order = ColumnOrder::kNatural;
  /// Rounds of refinement after the sweep, at most. The first moves single codes, scales held, until hardly any move
  /// lowers the loss; further ones fit the scales to their codes as well. Stops when nothing changes.
  int64_t refine = 0;
  /// Of the scales that ScaleMethod::kLoss tries, the number with which each group is quantized once more by a beam
  /// search that keeps four partial choices of codes: at most kMostBeamScales.
  int64_t beam_scales = 0;
};

struct GptqResult : QuantizedWeight {
  /// [N]: e H e^T per row, e = weight - dequantized, H with its ridge; float64 for a float64 weight, else float32.
  at::Tensor row_loss;
};

/// GPTQ (Frantar et al. 2022, arXiv:2210.17323, Algorithm 1): quantizes a column at a time and moves what rounding
/// lost onto the columns still to come, so that tr((W - Q) H (W - Q)^T) stays small.
///
/// weight:  [N, K], float32, float64, bfloat16 or float16 (the last two are computed in float32), any strides.
/// hessian: [K, K], float32 or float64, symmetric: X X^T / n of the layer's inputs, without a ridge.
///
/// Works without the inverse of H: with H = R R^T, R upper triangular,
///   target_j = w_j + (sum_{i<j} E_i R_ij) / R_jj,   q_j = quantize(target_j),   E_j = w_j - dequantize(q_j)
/// (see docs/algorithm.md). Codes do not depend on the number of threads nor on `block_size`.
///
/// An input that is always 0 (diag H = 0) has its column rounded to nearest.
/// Throws c10::ValueError / c10::TypeError on bad arguments and c10::LinAlgError where H with its ridge is not
/// positive definite; the message names the leading minor, the ridge used and what to try.
MINIQUANT_API GptqResult gptq(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options = {});

/// The textbook form of the same: the loop over blocks, groups and columns with the Cholesky factor of H^-1, on ATen
/// operations, for any device. Slow; it is what `gptq` is tested against. Arguments, result and errors as `gptq`, but
/// that ScaleMethod::kLoss, `beam_scales` and `refine` are left to it, and other scale methods than kAbsmax need the
/// CPU.
MINIQUANT_API GptqResult gptq_reference(const at::Tensor& weight, const at::Tensor& hessian,
                                        const GptqOptions& options = {});

}  // namespace miniquant
