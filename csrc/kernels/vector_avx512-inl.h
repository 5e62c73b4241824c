#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/short_vector-inl.h"

// AVX-512 with the features F, BW, VL and DQ.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

constexpr std::int64_t kVectorBytes = 64;
constexpr std::int64_t kVectorsPerTile = 3;
constexpr std::int64_t kStripColumns = 8;  // 3 x 8 accumulators of 32 registers

/// a * b + c, rounded once.
MINIQUANT_INLINE __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
MINIQUANT_INLINE __m512d multiply_add(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }

/// All 16 lanes. The intrinsics without a mask start from an undefined value, and GCC warns about it.
constexpr __mmask16 kAllLanes = 0xFFFF;

template <>
struct Fours<float, 16> {
  using Values = ShortVector<float, 16>::type;
  using Integers = ShortVector<std::int32_t, 16>::type;

  static MINIQUANT_INLINE Values permute(Values values, Integers from) {
    return reinterpret_cast<Values>(
        _mm512_maskz_permutevar_ps(kAllLanes, reinterpret_cast<__m512>(values), reinterpret_cast<__m512i>(from)));
  }

  template <std::int64_t kWith>
  static MINIQUANT_INLINE Integers exchange(Integers values) {
    static_assert(kWith == 1 || kWith == 2);
    constexpr _MM_PERM_ENUM kLanesFrom = kWith == 1 ? _MM_PERM_CDAB : _MM_PERM_BADC;
    return reinterpret_cast<Integers>(
        _mm512_maskz_shuffle_epi32(kAllLanes, reinterpret_cast<__m512i>(values), kLanesFrom));
  }
};

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
