#pragma once

#include <ATen/core/Tensor.h>

#include <mutex>

namespace miniquant::ops {

/// The lock that goes with a tensor's memory, the same for all of its views: one of a fixed number, so that unrelated
/// tensors may share one. Held by operators that read and write a tensor in place, which makes them safe to call from
/// several threads at a time.
std::mutex& lock_of(const at::Tensor& tensor);

}  // namespace miniquant::ops
