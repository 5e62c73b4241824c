#include "ops/storage_lock.h"

#include <array>
#include <cstddef>
#include <functional>

namespace miniquant::ops {

std::mutex& lock_of(const at::Tensor& tensor) {
  static std::array<std::mutex, 61> locks;  // a prime, because addresses are multiples of powers of two
  return locks.at(std::hash<const void*>()(tensor.storage().unsafeGetStorageImpl()) % locks.size());
}

}  // namespace miniquant::ops
