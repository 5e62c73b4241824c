#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace miniquant::algorithms {

/// An uninitialized tensor [elements] for as long as a call works. Where the operating system can, it lies in large
/// pages: new memory then takes less time, and a pass over matrices with long rows fewer address translations.
at::Tensor working_memory(int64_t elements, at::ScalarType dtype);

}  // namespace miniquant::algorithms
