#pragma once

#include <ATen/core/Tensor.h>

namespace miniquant::algorithms {

/// An uninitialized tensor on the CPU, in large pages where the operating system gives them on request (Linux): new
/// memory then takes less time, and a pass over matrices with long rows needs fewer address translations.
at::Tensor empty_in_large_pages(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace miniquant::algorithms
