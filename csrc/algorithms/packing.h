#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace miniquant::algorithms {

/// As miniquant::pack and miniquant::unpack, arguments already checked; any device.
at::Tensor pack(const at::Tensor& codes, int64_t bits);
at::Tensor unpack(const at::Tensor& packed, int64_t bits, int64_t columns);

}  // namespace miniquant::algorithms
