#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>

// The options that the functions take and the results that they give: types alone, for every layer.

namespace miniquant {

/// How the scales of groups are computed; docs/algorithm.md says what each costs and gains.
enum class ScaleMethod {
  kAbsmax,   ///< the scale that just holds the group's range
  kMse,      ///< of several that hold a smaller or larger range, the scale of least squared error
  kHessian,  ///< the same with each column's error weighted by diag H, H with its ridge; not for rtn
  kLoss,     ///< the scale with which the sweep adds least to the loss; gptq with dynamic group scales only
};

/// The uniform grid a weight [N, K] is rounded to: value = (code - zero_point) * scale.
///
/// Every group of `group_size` consecutive columns of a row has its own scale and zero point.
/// With b = bits and q = 2^(b-1) - 1:
///   symmetric:  codes in [-q, q],             scale = max|w| / q,               zero point 0
///   full range: codes in [-q - 1, q],         scale = -w / (q + 1) with w the weight of largest magnitude, either sign
///   asymmetric: codes in [-2^(b-1), 2^(b-1) - 1], scale = (hi - lo) / (2^b - 1), where [lo, hi] is the
///               group's range widened to contain 0, so that 0 is represented exactly
struct QuantizationGrid {
  /// 2 to 8.
  int64_t bits = 4;
  /// Columns per scale; -1 is one group per row. The last group of a row may be shorter.
  int64_t group_size = 64;
  bool symmetric = true;
  /// A symmetric grid with one code more on the negative side and scales of either sign.
  bool full_range = false;
};

/// A grid, and where its scales and zero points come from.
struct GridOptions : QuantizationGrid {
  /// How scales are computed.
  ScaleMethod scale_method = ScaleMethod::kAbsmax;
  /// Scales to use instead of those computed from the weight: [N, G], of `scale_dtype`, positive (not 0 if
  /// `full_range`).
  std::optional<at::Tensor> scales = std::nullopt;
  /// Zero points that go with `scales`: int8 [N, G]; needed where `symmetric` is false.
  std::optional<at::Tensor> zero_points = std::nullopt;
  /// The dtype in which scales will be stored, the weight's by default: kHalf, kBFloat16, kFloat or, for a kDouble
  /// weight, kDouble. Scales are rounded to it before codes are chosen, and returned in it.
  std::optional<at::ScalarType> scale_dtype = std::nullopt;
};

/// A weight on its grid, and which grid that is: for dequantize(), quantization_loss() and packing as a whole.
struct QuantizedWeight : QuantizationGrid {
  at::Tensor codes;        ///< int8 [N, K]
  at::Tensor scales;       ///< [N, G], of GridOptions::scale_dtype; G = ceil(K / group_size), or 1 for group_size = -1
  at::Tensor zero_points;  ///< int8 [N, G]; all 0 for a symmetric grid
};

/// Which weights a group's scale is taken from.
enum class GroupScales {
  kStatic,   ///< the original weights: the scales do not depend on the Hessian
  kDynamic,  ///< the weights as updated by every earlier column, at the moment the group is reached
};

/// The order in which columns are quantized. Scales stay with the stored columns in any order.
enum class ColumnOrder {
  kNatural,     ///< left to right
  kActivation,  ///< descending diag(hessian), ties in stored order
  /// Whole groups by descending mean of diag(hessian), a shorter last group last. Of the columns of a group the last is
  /// that of least diag(hessian), the one before it that of least variance given the last, and so on (by descending
  /// diag(hessian) in groups of more than 512 columns).
  kGroup,
};

/// The max of GptqOptions::beam_scales: the number of scales that ScaleMethod::kLoss tries (it tries twice as many for
/// a full range of 2 or 3 bits, one of either sign).
inline constexpr int64_t kMostBeamScales = 25;

struct GptqOptions : GridOptions {
  /// Added to the Hessian's diagonal, relative to its mean: H += ridge * mean(diag H) * I.
  double ridge = 0.01;
  /// Columns per block of the sweep. Changes the time taken, not the result.
  int64_t block_size = 128;
  /// kDynamic needs an order that reaches a group's columns together (not kActivation) and no given scales.
  GroupScales group_scales = GroupScales::kStatic;
  ColumnOrder column_order = ColumnOrder::kNatural;
  /// Max rounds of refinement after the sweep. The first moves single codes, scales held, until hardly any move lowers
  /// the loss; further rounds fit the scales to their codes as well. Stops when nothing changes.
  int64_t refine = 0;
  /// Of the scales that ScaleMethod::kLoss tries, the number with which each group is quantized once more by a beam
  /// search that keeps four partial choices of codes: 0 to kMostBeamScales.
  int64_t beam_scales = 0;
};

struct GptqResult : QuantizedWeight {
  /// [N]: e H e^T per row, H with its ridge; float64 for a float64 weight, else float32. Here e = weight - (code -
  /// zero_point) * scale with the product as computed in that dtype. A bfloat16 or float16 layer rounds the product
  /// once more: quantization_loss(weight, dequantize(result, weight.scalar_type()), hessian) measures what it loses.
  at::Tensor row_loss;
};

/// What a HessianAccumulator keeps of one sum, or of one for either half of the tokens: S = 1 or 2.
struct HessianSums {
  at::Tensor sums;     ///< [S, K, K], float32 or float64: X^T diag(w) X of tokens X [n, K] of weights w
  at::Tensor tokens;   ///< int64 [S]: n
  at::Tensor weights;  ///< float64 [2, S]: the sum of the weights, and that of their squares
};

}  // namespace miniquant
