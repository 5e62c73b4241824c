#pragma once

#include <ATen/core/Tensor.h>
#include <miniquant/export.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace miniquant {

/// How the scales of groups are computed; docs/algorithm.md says what each costs and gains.
enum class ScaleMethod {
  kAbsmax,   ///< the scale that just holds the group's range
  kMse,      ///< of several that hold a smaller or larger one, that of least squared error
  kHessian,  ///< the same with each column's error weighted by diag(hessian); not for rtn
  kLoss,     ///< that with which the sweep adds least to the loss; gptq with dynamic group scales only
};

/// The name under which the operators know it: "absmax", ...
MINIQUANT_API std::string_view name_of(ScaleMethod method);

/// The uniform grid a weight [N, K] is rounded to: value = (code - zero_point) * scale.
///
/// Every group of `group_size` consecutive columns of a row has its own scale and zero point.
/// With b = bits and q = 2^(b-1) - 1:
///   symmetric:  codes in [-q, q],             scale = max|w| / q,               zero point 0
///   full range: codes in [-q - 1, q],         scale = -w / (q + 1) with w the weight of largest magnitude, either sign
///   asymmetric: codes in [-2^(b-1), 2^(b-1) - 1], scale = (hi - lo) / (2^b - 1), where [lo, hi] is the
///               group's range widened to contain 0, so that 0 is represented exactly
struct GridOptions {
  /// 2 to 8.
  int64_t bits = 4;
  /// Columns per scale; -1 is one group per row. The last group of a row may be shorter.
  int64_t group_size = 64;
  bool symmetric = true;
  /// A symmetric grid with one code more on the negative side and scales of either sign.
  bool full_range = false;
  /// How scales are computed.
  ScaleMethod scale_method = ScaleMethod::kAbsmax;
  /// Scales to use instead of those computed from the weight: [N, groups], the weight's dtype, positive (not 0 if
  /// `full_range`).
  std::optional<at::Tensor> scales = std::nullopt;
  /// Zero points that go with `scales`: int8 [N, groups]; needed where `symmetric` is false.
  std::optional<at::Tensor> zero_points = std::nullopt;
};

/// A weight on its grid.
struct QuantizedWeight {
  at::Tensor codes;        ///< int8 [N, K]
  at::Tensor scales;       ///< [N, G], the weight's dtype; G = ceil(K / group_size), or 1 for group_size = -1
  at::Tensor zero_points;  ///< int8 [N, G]; all 0 for a symmetric grid
};

/// Rounds every weight to the nearest point of its group's grid (RTN), ties to even.
///
/// weight: [N, K], float32, float64, bfloat16 or float16 (the last two are computed in float32), any strides.
/// Throws c10::ValueError or c10::TypeError that names the argument, what was expected and what came.
MINIQUANT_API QuantizedWeight rtn(const at::Tensor& weight, const GridOptions& options = {});

/// (codes - zero_points) * scales, each group with its own: [N, K] in the dtype of `scales`.
///
/// codes: int8 [N, K]; scales: [N, G], float32, float64, bfloat16 or float16; zero_points: int8 [N, G], with
/// G = ceil(K / group_size), or 1 for group_size = -1.
/// Throws c10::ValueError / c10::TypeError on a wrong shape, dtype or device.
MINIQUANT_API at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                                    int64_t group_size);

}  // namespace miniquant
