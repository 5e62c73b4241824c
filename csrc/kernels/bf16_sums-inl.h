#pragma once

#include <cstdint>

#include "kernels/bf16.h"
#include "kernels/target-inl.h"

// What a unit multiplies, and the layout of a square's sums: tiles [kBf16Columns][kBf16Columns], in rows of
// kBf16MaxSquarePanels tiles.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

constexpr std::int64_t kSumTile = kBf16Columns * kBf16Columns;
constexpr std::int64_t kSumRow = kBf16MaxSquarePanels * kSumTile;

/// Packed tiles [2][blocks] of each side; a panel begins `panel_stride` after the one before.
struct Bf16Operands {
  const std::uint16_t* left;
  const std::uint16_t* right;
  const std::uint16_t* next_left;  ///< what `left` will be in the next call, to fetch it early
  std::int64_t panel_stride;
  std::int64_t blocks;
};

/// Tile (j, i) of 2 x 2.
MINIQUANT_INLINE float* sum_tile(float* sums, std::int64_t j, std::int64_t i) {
  return sums + j * kSumRow + i * kSumTile;
}

/// For units whose add() adds to the sums in memory: these are 0 at the beginning, and complete at the end.
struct AddsInMemory {
  /// Blocks whose sum is added at once: short sums, so rounding does not grow with the number of tokens.
  static constexpr std::int64_t kBlocksPerSum = 4;

  static MINIQUANT_INLINE void begin(float* sums, bool fresh) {
    for (std::int64_t j = 0; fresh && j < 2; ++j) {
      for (std::int64_t element = 0; element < 2 * kSumTile; ++element) {
        sums[j * kSumRow + element] = 0.0F;
      }
    }
  }

  static MINIQUANT_INLINE void end(float* /*sums*/, bool /*fresh*/) {}
};

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
