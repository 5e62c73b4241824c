#include "algorithms/large_pages.h"

#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace miniquant::algorithms {
namespace {

/// Asks for large pages in the part of the memory that they can fill. The contents stay, and a system without them
/// refuses, which changes nothing but time.
void ask_for_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = uintptr_t{2} * 1024 * 1024;  // of x86-64, and of ARM with pages of 4 KiB
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (address + bytes) / kLargePage * kLargePage;
  if (begin < end) {
    madvise(static_cast<char*>(memory) + (begin - address), end - begin, MADV_HUGEPAGE);
  }
#endif
}

}  // namespace

at::Tensor empty_in_large_pages(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor memory = at::empty(sizes, at::TensorOptions(at::kCPU).dtype(dtype));
  ask_for_large_pages(memory.mutable_data_ptr(), memory.nbytes());
  return memory;
}

}  // namespace miniquant::algorithms
