#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "miniquant/options.h"

namespace miniquant::algorithms {

/// Rounds to nearest. Arguments as miniquant::rtn, already checked.
QuantizedWeight rtn(const at::Tensor& weight, const GridOptions& options);

/// Inverse of the grid. Arguments as miniquant::dequantize, already checked; any device.
at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                      int64_t group_size, std::optional<at::ScalarType> dtype = std::nullopt);

/// The same made of PyTorch's operations, which dequantize() takes on other devices than the CPU.
at::Tensor dequantize_by_operations(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                                    int64_t group_size, std::optional<at::ScalarType> dtype = std::nullopt);

}  // namespace miniquant::algorithms
