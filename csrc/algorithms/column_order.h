#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "miniquant/options.h"

namespace miniquant::algorithms {

/// [K] int64: the stored column that each step of a sweep quantizes. Only kGroup reads `group_size` (-1: one group).
/// hessian: [K, K], on any device for kNatural and kActivation, on the CPU for kGroup.
at::Tensor order_of_columns(const at::Tensor& hessian, ColumnOrder order, int64_t group_size);

}  // namespace miniquant::algorithms
