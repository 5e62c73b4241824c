#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace miniquant::algorithms {

/// As miniquant::pack and miniquant::unpack, arguments already checked; any device.
at::Tensor pack(const at::Tensor& codes, int64_t bits);
at::Tensor unpack(const at::Tensor& packed, int64_t bits, int64_t columns);

/// Whether all codes (int8, any device) are in [-2^(bits - 1), 2^(bits - 1) - 1].
bool fit_in(const at::Tensor& codes, int64_t bits);

/// pack() and unpack() made of PyTorch's operations: what they are on other devices than the CPU.
at::Tensor pack_by_operations(const at::Tensor& codes, int64_t bits);
at::Tensor unpack_by_operations(const at::Tensor& packed, int64_t bits, int64_t columns);

}  // namespace miniquant::algorithms
