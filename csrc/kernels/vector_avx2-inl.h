#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/short_vector-inl.h"

// AVX2 with fused multiply-adds.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

constexpr std::int64_t kVectorBytes = 32;
constexpr std::int64_t kVectorsPerTile = 3;
constexpr std::int64_t kStripColumns = 4;  // 3 x 4 accumulators of 16 registers

/// a * b + c, rounded once.
MINIQUANT_INLINE __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
MINIQUANT_INLINE __m256d multiply_add(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }

template <>
struct Fours<float, 8> {
  using Values = ShortVector<float, 8>::type;
  using Integers = ShortVector<std::int32_t, 8>::type;

  static MINIQUANT_INLINE Values permute(Values values, Integers from) {
    return reinterpret_cast<Values>(
        _mm256_permutevar_ps(reinterpret_cast<__m256>(values), reinterpret_cast<__m256i>(from)));
  }

  template <std::int64_t kWith>
  static MINIQUANT_INLINE Integers exchange(Integers values) {
    static_assert(kWith == 1 || kWith == 2);
    constexpr int kLanesFrom = kWith == 1 ? _MM_PERM_CDAB : _MM_PERM_BADC;
    return reinterpret_cast<Integers>(_mm256_shuffle_epi32(reinterpret_cast<__m256i>(values), kLanesFrom));
  }
};

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
