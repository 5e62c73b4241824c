#pragma once

#include <cstdint>

#include "kernels/bf16.h"
#include "kernels/bf16_sums-inl.h"
#include "kernels/target-inl.h"

// The products in plain C++, so that any CPU can test the packing and the loops around the instruction.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

MINIQUANT_INLINE float value_of(std::uint16_t bits) { return __builtin_bit_cast(float, std::uint32_t{bits} << 16U); }

/// sum[j][i] += sum over pairs of tokens of one tile.
MINIQUANT_INLINE void multiply_tile(const std::uint16_t* left, const std::uint16_t* right, float* sum) {
  for (std::int64_t j = 0; j < kBf16Columns; ++j) {
    for (std::int64_t i = 0; i < kBf16Columns; ++i) {
      float total = 0.0F;
      for (std::int64_t token = 0; token < kBf16Tokens; ++token) {
        const std::uint16_t factor = right[(token / 2 * kBf16Columns + i) * 2 + token % 2];
        total += value_of(left[j * kBf16Tokens + token]) * value_of(factor);
      }
      sum[j * kBf16Columns + i] += total;
    }
  }
}

struct Bf16Multiplier : AddsProductByProduct<Bf16Multiplier> {
  static constexpr std::int64_t kMostProducts = 0;
  static constexpr std::int64_t kMostSquarePanels = 32;
  static constexpr std::int64_t kMostPackedBytes = std::int64_t{64} * 1024 * 1024;

  static void add_product(const Bf16Operands& operands, Bf16Sums sums) {
    for (std::int64_t block = 0; block < operands.blocks; ++block) {
      for (std::int64_t tile = 0; tile < 4; ++tile) {
        multiply_tile(operands.left + tile / 2 * operands.panel_stride + block * kBf16TileElements,
                      operands.right + tile % 2 * operands.panel_stride + block * kBf16TileElements,
                      sums.tile(tile / 2, tile % 2));
      }
    }
  }
};

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
