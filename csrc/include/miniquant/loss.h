#pragma once

#include <ATen/core/Tensor.h>
#include <miniquant/export.h>
#include <miniquant/options.h>

namespace miniquant {

/// The layer loss per row, [N]: e H e^T with e = weight - dequantized. The sum over rows is the loss of the layer.
///
/// weight, dequantized: [N, K], float32, float64, bfloat16 or float16; the two dtypes may differ. hessian: [K, K],
/// float32 or float64, with or without a ridge. Values are not checked: NaN gives NaN.
/// Accumulates in float64; the result is float64 for a float64 weight, otherwise float32.
/// Throws c10::ValueError / c10::TypeError on a wrong shape, dtype or device.
MINIQUANT_API at::Tensor quantization_loss(const at::Tensor& weight, const at::Tensor& dequantized,
                                           const at::Tensor& hessian);

/// The same for a whole quantized weight, measured as GptqResult::row_loss is: the product (code - zero_point) * scale
/// is computed in float32, or in float64 where the weight or the scales are float64.
MINIQUANT_API at::Tensor quantization_loss(const at::Tensor& weight, const QuantizedWeight& quantized,
                                           const at::Tensor& hessian);

}  // namespace miniquant
