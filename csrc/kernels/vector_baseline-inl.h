#pragma once

#include <cstdint>

#include "kernels/short_vector-inl.h"

// Vectors of 16 bytes in the compiler's own types, for any CPU.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

constexpr std::int64_t kVectorBytes = 16;
constexpr std::int64_t kVectorsPerTile = 2;
constexpr std::int64_t kStripColumns = 4;  // 2 x 4 accumulators of 16 registers

/// a * b + c, rounded twice.
MINIQUANT_INLINE ShortVector<float, 4>::type multiply_add(ShortVector<float, 4>::type a, ShortVector<float, 4>::type b,
                                                          ShortVector<float, 4>::type c) {
  return a * b + c;
}
MINIQUANT_INLINE ShortVector<double, 2>::type multiply_add(ShortVector<double, 2>::type a,
                                                           ShortVector<double, 2>::type b,
                                                           ShortVector<double, 2>::type c) {
  return a * b + c;
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
