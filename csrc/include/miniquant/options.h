#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>

// The types of options and results, without functions, so every layer may include them.

namespace miniquant {

/// How the scales of groups are computed. docs/algorithm.md lists the gain and the cost of each method.
enum class ScaleMethod {
  kAbsmax,   ///< the smallest scale that holds the group's range
  kMse,      ///< of the scales for several smaller and larger ranges, the one with the least squared error
  kHessian,  ///< the same with each column's squared error weighted by diag H, H with its ridge; not for rtn
  kLoss,     ///< the scale with which the sweep adds least to the loss; only for gptq with dynamic group scales
};

/// The uniform grid a weight [N, K] is rounded to: value = (code - zero_point) * scale.
///
/// Every group of `group_size` consecutive columns of a row has its own scale and zero point.
/// With b = bits and q = 2^(b-1) - 1:
///   symmetric:  codes in [-q, q],             scale = max|w| / q,               zero point 0
///   full range: codes in [-q - 1, q],         scale = -w / (q + 1) with w the weight of largest magnitude, either sign
///   asymmetric: codes in [-2^(b-1), 2^(b-1) - 1], scale = (hi - lo) / (2^b - 1), where [lo, hi] is the
///               group's range widened to contain 0, which is then represented exactly
struct QuantizationGrid {
  /// 2 to 8.
  int64_t bits = 4;
  /// Columns per scale; -1 is one group per row. The last group of a row may be shorter.
  int64_t group_size = 64;
  bool symmetric = true;
  /// A symmetric grid with one code more on the negative side and scales of either sign.
  bool full_range = false;
};

/// A grid and the source of its scales and zero points.
struct GridOptions : QuantizationGrid {
  /// How scales are computed.
  ScaleMethod scale_method = ScaleMethod::kAbsmax;
  /// Scales to use instead of computed ones: [N, G], of `scale_dtype`, positive (if `full_range`: not 0).
  std::optional<at::Tensor> scales = std::nullopt;
  /// Zero points that go with `scales`: int8 [N, G]; required where `symmetric` is false.
  std::optional<at::Tensor> zero_points = std::nullopt;
  /// The dtype in which scales will be stored, by default the weight's: kHalf, kBFloat16, kFloat or, for a kDouble
  /// weight, kDouble. Scales are rounded to it before codes are chosen, and returned in it.
  std::optional<at::ScalarType> scale_dtype = std::nullopt;
};

/// A quantized weight with the parameters of its grid, so dequantize() and quantization_loss() take it as a whole.
struct QuantizedWeight : QuantizationGrid {
  at::Tensor codes;        ///< int8 [N, K]
  at::Tensor scales;       ///< [N, G], of GridOptions::scale_dtype; G = ceil(K / group_size), or 1 for group_size = -1
  at::Tensor zero_points;  ///< int8 [N, G]; all 0 for a symmetric grid
};

/// How exact the products are that a Hessian is the sum of.
enum class HessianPrecision {
  kFull,  ///< as those of the sum's dtype
  /// Of float32 inputs of a float32 sum three products of bfloat16 values may take the place of each, where the CPU has
  /// a unit with which that is faster (AMX). An entry of X^T diag(w) X then has an error of at most 1.3e-4 times that
  /// of |X|^T diag(w) |X|. On other CPUs, and for other dtypes, the same as kFull.
  kBf16x3,
};

/// Which weights a group's scale is computed from.
enum class GroupScales {
  kStatic,   ///< the original weights: the scales do not depend on the Hessian
  kDynamic,  ///< the weights as updated by every earlier column, at the moment the group is reached
};

/// The order in which columns are quantized. In every order a group is a run of consecutive stored columns.
enum class ColumnOrder {
  kNatural,     ///< left to right
  kActivation,  ///< descending diag(hessian), ties in stored order
  /// Whole groups by descending mean of diag(hessian); a shorter last group comes last. Within a group the last column
  /// is the one of least diag(hessian), the column before it the one of least variance given the last, and so on.
  /// Groups of more than 512 columns are in descending diag(hessian) instead.
  kGroup,
};

/// Max value of GptqOptions::beam_scales: the number of scales that ScaleMethod::kLoss tries. (For a full range of 2 or
/// 3 bits it tries twice as many: each with either sign.)
inline constexpr int64_t kMostBeamScales = 25;

struct GptqOptions : GridOptions {
  /// Added to the Hessian's diagonal, relative to its mean: H += ridge * mean(diag H) * I.
  double ridge = 0.01;
  /// Columns per block of the sweep. Changes the time taken, not the result.
  int64_t block_size = 128;
  /// kDynamic needs an order that takes a group's columns together (not kActivation) and no given scales.
  GroupScales group_scales = GroupScales::kStatic;
  ColumnOrder column_order = ColumnOrder::kNatural;
  /// Max rounds of refinement after the sweep. The first round moves single codes, scales held, until hardly any move
  /// lowers the loss; further rounds also fit the scales to their codes. Ends early when nothing changes.
  int64_t refine = 0;
  /// Number of scales per group, the best of those that ScaleMethod::kLoss tries, for which the group is quantized
  /// again by a beam search of four partial choices of codes: 0 (no beam search) to kMostBeamScales.
  int64_t beam_scales = 0;
};

struct GptqResult : QuantizedWeight {
  /// [N]: e H e^T per row, H with its ridge; float64 for a float64 weight, otherwise float32. Here e is the weight
  /// minus (code - zero_point) * scale, a product computed in that dtype. A bfloat16 or float16 layer rounds the
  /// product once more: quantization_loss(weight, dequantize(result, weight.scalar_type()), hessian) measures the loss
  /// of that layer.
  at::Tensor row_loss;
};

/// A type of GGUF with two levels of scales. Each superblock of 256 columns of a row has a float16 step d; the scale of
/// each of its groups is a multiple of d. Types with minima have a second step, of which the minima are multiples.
///
///   type    bits  columns per group  scale / d     minimum / its d   value
///   Q2_K    2     16                 1 to 15       0 to 15           (code - zero_point) * scale - minimum
///   Q3_K    3     16                 -32 to 31     no minima         code * scale
///   Q4_K    4     32                 1 to 63       0 to 63           (code - zero_point) * scale - minimum
///   Q5_K    5     32                 1 to 63       0 to 63           (code - zero_point) * scale - minimum
///   Q6_K    6     16                 -128 to 127   no minima         code * scale
enum class SuperblockType { kQ2K, kQ3K, kQ4K, kQ5K, kQ6K };

/// A weight quantized to one of them. `scales` are float32 and exact. Codes are in [-2^(bits-1), 2^(bits-1) - 1]; where
/// there are minima the zero point is the lowest of these.
struct SuperblockWeight : QuantizedWeight {
  at::Tensor minima;        ///< float32 [N, G], exact; 0 for types without minima
  at::Tensor super_scales;  ///< float16 [N, K / 256]: the steps of the scales
  at::Tensor super_minima;  ///< float16 [N, K / 256]: the steps of the minima
};

struct SuperblockResult : SuperblockWeight {
  at::Tensor row_loss;  ///< [N]: as of GptqResult
};

/// What a HessianAccumulator keeps: S = 1 sum over all tokens, or S = 2 sums, one for each half of the tokens.
struct HessianSums {
  at::Tensor sums;     ///< [S, K, K], float32 or float64: X^T diag(w) X of tokens X [n, K] with weights w
  at::Tensor tokens;   ///< int64 [S]: n
  at::Tensor weights;  ///< float64 [2, S]: the sum of the weights, and the sum of their squares
};

}  // namespace miniquant
