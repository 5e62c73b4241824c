#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace miniquant::algorithms {

/// As miniquant::pack_int4 and miniquant::unpack_int4, arguments already checked; any device.
at::Tensor pack_int4(const at::Tensor& codes);
at::Tensor unpack_int4(const at::Tensor& packed, int64_t columns);

}  // namespace miniquant::algorithms
