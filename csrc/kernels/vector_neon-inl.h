#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "kernels/short_vector-inl.h"

// NEON (Advanced SIMD), which every 64-bit ARM CPU has.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

constexpr std::int64_t kVectorBytes = 16;
constexpr std::int64_t kVectorsPerTile = 6;
constexpr std::int64_t kStripColumns = 4;  // 6 x 4 accumulators of 32 registers

/// a * b + c, rounded once.
MINIQUANT_INLINE float32x4_t multiply_add(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
MINIQUANT_INLINE float64x2_t multiply_add(float64x2_t a, float64x2_t b, float64x2_t c) { return vfmaq_f64(c, a, b); }

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
