#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "miniquant/options.h"

namespace miniquant::algorithms {

/// Columns that share the steps of their scales and minima.
inline constexpr int64_t kSuperblockColumns = 256;

/// The groups' grid of a type: bits, columns per group, symmetric or not.
QuantizationGrid grid_of(SuperblockType type);

/// Arguments as miniquant::rtn_superblocks, already checked.
SuperblockWeight rtn_superblocks(const at::Tensor& weight, SuperblockType type);

/// Arguments as miniquant::gptq_superblocks, already checked.
SuperblockResult gptq_superblocks(const at::Tensor& weight, const at::Tensor& hessian, SuperblockType type,
                                  const GptqOptions& options);

}  // namespace miniquant::algorithms
