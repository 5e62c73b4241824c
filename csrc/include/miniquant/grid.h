#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <miniquant/export.h>
#include <miniquant/options.h>

#include <cstdint>
#include <optional>

namespace miniquant {

/// Rounds every weight to the nearest point of its group's grid (RTN), ties to even.
///
/// weight: [N, K], float32, float64, bfloat16 or float16 (bfloat16 and float16 are computed in float32), any strides.
/// Throws c10::ValueError / c10::TypeError on bad arguments; the message names the argument, the requirement and the
/// value.
MINIQUANT_API QuantizedWeight rtn(const at::Tensor& weight, const GridOptions& options = {});

/// Returns (codes - zero_points) * scales, [N, K], each column with the scale and zero point of its group, in `dtype`
/// (default: the dtype of `scales`). The product is computed in the widest of float32, the dtype of `scales` and
/// `dtype`.
///
/// codes: int8 [N, K]; scales: [N, G], float32, float64, bfloat16 or float16; zero_points: int8 [N, G].
/// G = ceil(K / group_size), or 1 for group_size = -1.
/// Throws c10::ValueError / c10::TypeError on a wrong shape, dtype or device.
MINIQUANT_API at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                                    int64_t group_size, std::optional<at::ScalarType> dtype = std::nullopt);

/// The same for a whole quantized weight.
MINIQUANT_API at::Tensor dequantize(const QuantizedWeight& quantized,
                                    std::optional<at::ScalarType> dtype = std::nullopt);

}  // namespace miniquant
