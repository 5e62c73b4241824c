#pragma once

#include <cstdint>

// Integer arithmetic of sizes. Always inlined, so no kernel object defines a symbol for it: kernels/target-inl.h.

namespace miniquant::kernels {

[[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t min_of(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}

/// The number of pieces of `size` that hold `count`; the last piece may be partly filled.
[[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t ceil_div(std::int64_t count, std::int64_t size) {
  return (count + size - 1) / size;
}

}  // namespace miniquant::kernels
