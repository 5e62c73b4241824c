#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/bf16.h"
#include "kernels/bf16_sums-inl.h"
#include "kernels/target-inl.h"

// AVX512-BF16: vdpbf16ps adds the products of a pair of tokens, rounding twice.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

class Bf16Multiplier : public AddsProductByProduct<Bf16Multiplier> {
 public:
  static constexpr std::int64_t kMostProducts = 1;
  static constexpr std::int64_t kMostSquarePanels = 16;
  static constexpr std::int64_t kMostPackedBytes = std::int64_t{16} * 1024 * 1024;

  static MINIQUANT_INLINE void add_product(const Bf16Operands& operands, Bf16Sums sums) {
    const std::int64_t stride = operands.panel_stride;
    for (std::int64_t block = 0; block < operands.blocks; block += kBlocksPerSum) {
      const std::int64_t count = min_of(operands.blocks - block, kBlocksPerSum);
      const std::uint16_t* const left = operands.left + block * kBf16TileElements;
      const std::uint16_t* const right = operands.right + block * kBf16TileElements;
      // Each of the four passes over the rows fetches a panel of the blocks that come next.
      const std::int64_t step = count * kBf16TileElements;
      const bool last = block + count == operands.blocks;
      const std::uint16_t* const next_left = last ? operands.next_left : left + step;
      const std::uint16_t* const next_right = last ? operands.right : right + step;
      const std::uint16_t* const fetched[] = {next_left, next_left + stride, next_right, next_right + stride};
      for (std::int64_t row = 0; row < 2 * kBf16Columns; row += kRows) {
        add_rows(left + row / kBf16Columns * stride + row % kBf16Columns * kBf16Tokens, right, fetched[row / kRows],
                 stride, count, sums.tile(row / kBf16Columns, 0) + row % kBf16Columns * kBf16Columns);
      }
    }
  }

 private:
  /// Rows of sums in registers, of two vectors each.
  static constexpr std::int64_t kRows = 8;
  static_assert(2 * kBf16Columns == 4 * kRows);

  static MINIQUANT_INLINE void add_rows(const std::uint16_t* left, const std::uint16_t* right,
                                        const std::uint16_t* fetched, std::int64_t panel_stride, std::int64_t blocks,
                                        float* sums) {
    __m512 sum[kRows][2] = {};
    for (std::int64_t block = 0; block < blocks; ++block) {
      for (std::int64_t pair = 0; pair < kBf16Tokens / 2; ++pair) {
        const __m512bh first = vector_of(right + pair * kBf16Tokens);
        const __m512bh second = vector_of(right + panel_stride + pair * kBf16Tokens);
        __builtin_prefetch(fetched + pair * kBf16Tokens);
#pragma GCC unroll 8
        for (std::int64_t row = 0; row < kRows; ++row) {
          const __m512bh factor = broadcast_pair(left + row * kBf16Tokens + 2 * pair);
          sum[row][0] = _mm512_dpbf16_ps(sum[row][0], factor, first);
          sum[row][1] = _mm512_dpbf16_ps(sum[row][1], factor, second);
        }
      }
      left += kBf16TileElements;
      right += kBf16TileElements;
      fetched += kBf16TileElements;
    }
#pragma GCC unroll 8
    for (std::int64_t row = 0; row < kRows; ++row) {
      add_to(sums + row * kBf16Columns, sum[row][0]);
      add_to(sums + kSumTile + row * kBf16Columns, sum[row][1]);
    }
  }

  static MINIQUANT_INLINE __m512bh vector_of(const std::uint16_t* from) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
  }

  static MINIQUANT_INLINE __m512bh broadcast_pair(const std::uint16_t* from) {
    int pair = 0;
    __builtin_memcpy(&pair, from, sizeof(pair));
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }

  static MINIQUANT_INLINE void add_to(float* to, __m512 value) {
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), value));
  }
};

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
