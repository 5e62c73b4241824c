#pragma once

#include <ATen/core/Tensor.h>

#include <mutex>

namespace miniquant::ops {

/// The lock of a tensor's memory, the same for all views of the tensor. The number of locks is fixed, so unrelated
/// tensors may share one. Operators that read and write a tensor in place hold it, so several threads may call them at
/// a time.
std::mutex& lock_of(const at::Tensor& tensor);

}  // namespace miniquant::ops
