#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/bf16.h"
#include "kernels/bf16_sums-inl.h"
#include "kernels/target-inl.h"

// BF16 of ARM: bfmmla adds to a square of 2 x 2 sums the products of 4 tokens, rounding twice.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

class Bf16Multiplier : public AddsProductByProduct<Bf16Multiplier> {
 public:
  static constexpr std::int64_t kMostProducts = 1;
  static constexpr std::int64_t kMostSquarePanels = 16;
  static constexpr std::int64_t kMostPackedBytes = std::int64_t{16} * 1024 * 1024;

  static MINIQUANT_INLINE void add_product(const Bf16Operands& operands, Bf16Sums sums) {
    for (std::int64_t block = 0; block < operands.blocks; block += kBlocksPerSum) {
      const std::int64_t count = min_of(operands.blocks - block, kBlocksPerSum);
      for (std::int64_t j = 0; j < 2; ++j) {
        for (std::int64_t i = 0; i < 2; ++i) {
          add_tile(operands.left + j * operands.panel_stride + block * kBf16TileElements,
                   operands.right + i * operands.panel_stride + block * kBf16TileElements, count, sums.tile(j, i));
        }
      }
    }
  }

 private:
  /// Rows and columns of sums in registers: kSide / 2 x kSide / 2 squares.
  static constexpr std::int64_t kSide = 8;
  static constexpr std::int64_t kSquares = kSide / 2;
  static constexpr std::int64_t kTokensPerStep = 4;

  static MINIQUANT_INLINE void add_tile(const std::uint16_t* left, const std::uint16_t* right, std::int64_t blocks,
                                        float* sums) {
    for (std::int64_t row = 0; row < kBf16Columns; row += kSide) {
      for (std::int64_t column = 0; column < kBf16Columns; column += kSide) {
        add_part(left + row * kBf16Tokens, right + 2 * column, blocks, sums + row * kBf16Columns + column);
      }
    }
  }

  static MINIQUANT_INLINE void add_part(const std::uint16_t* left, const std::uint16_t* right, std::int64_t blocks,
                                        float* sums) {
    float32x4_t sum[kSquares][kSquares] = {};
    for (std::int64_t block = 0; block < blocks; ++block) {
      for (std::int64_t token = 0; token < kBf16Tokens; token += kTokensPerStep) {
        bfloat16x8_t columns[kSquares];
        const std::uint16_t* const pairs = right + token / 2 * kBf16Tokens;
        pair_columns(pairs, columns);
        pair_columns(pairs + kSide, columns + kSquares / 2);
#pragma GCC unroll 4
        for (std::int64_t j = 0; j < kSquares; ++j) {
          const std::uint16_t* const row = left + 2 * j * kBf16Tokens + token;
          const bfloat16x8_t rows = vreinterpretq_bf16_u16(vcombine_u16(vld1_u16(row), vld1_u16(row + kBf16Tokens)));
#pragma GCC unroll 4
          for (std::int64_t i = 0; i < kSquares; ++i) {
            sum[j][i] = vbfmmlaq_f32(sum[j][i], rows, columns[i]);
          }
        }
      }
      left += kBf16TileElements;
      right += kBf16TileElements;
    }
#pragma GCC unroll 4
    for (std::int64_t j = 0; j < kSquares; ++j) {
#pragma GCC unroll 2
      for (std::int64_t i = 0; i < kSquares; i += 2) {
        float* const to = sums + 2 * j * kBf16Columns + 2 * i;
        add_to(to, vcombine_f32(vget_low_f32(sum[j][i]), vget_low_f32(sum[j][i + 1])));
        add_to(to + kBf16Columns, vcombine_f32(vget_high_f32(sum[j][i]), vget_high_f32(sum[j][i + 1])));
      }
    }
  }

  /// Two pairs of tokens of 4 columns, as two operands with 4 tokens of 2 columns each.
  static MINIQUANT_INLINE void pair_columns(const std::uint16_t* pairs, bfloat16x8_t* columns) {
    const uint32x4_t first = vreinterpretq_u32_u16(vld1q_u16(pairs));
    const uint32x4_t second = vreinterpretq_u32_u16(vld1q_u16(pairs + kBf16Tokens));
    columns[0] = vreinterpretq_bf16_u32(vzip1q_u32(first, second));
    columns[1] = vreinterpretq_bf16_u32(vzip2q_u32(first, second));
  }

  static MINIQUANT_INLINE void add_to(float* to, float32x4_t value) { vst1q_f32(to, vaddq_f32(vld1q_f32(to), value)); }
};

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
