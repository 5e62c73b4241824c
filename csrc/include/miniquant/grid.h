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
/// weight: [N, K], float32, float64, bfloat16 or float16 (the last two are computed in float32), any strides.
/// Throws c10::ValueError or c10::TypeError that names the argument, what was expected and what came.
MINIQUANT_API QuantizedWeight rtn(const at::Tensor& weight, const GridOptions& options = {});

/// (codes - zero_points) * scales, each group with its own: [N, K] in `dtype`, or that of `scales`. The product is
/// computed in the wider of float32, the dtype of `scales` and `dtype`.
///
/// codes: int8 [N, K]; scales: [N, G], float32, float64, bfloat16 or float16; zero_points: int8 [N, G], with
/// G = ceil(K / group_size), or 1 for group_size = -1.
/// Throws c10::ValueError / c10::TypeError on a wrong shape, dtype or device.
MINIQUANT_API at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                                    int64_t group_size, std::optional<at::ScalarType> dtype = std::nullopt);

/// The same of a whole quantized weight.
MINIQUANT_API at::Tensor dequantize(const QuantizedWeight& quantized,
                                    std::optional<at::ScalarType> dtype = std::nullopt);

}  // namespace miniquant
