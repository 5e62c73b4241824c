#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/bf16.h"
#include "kernels/bf16_sums-inl.h"
#include "kernels/target-inl.h"

// AMX-BF16: tdpbf16ps adds the products of a whole packed tile. Tiles 0 to 3 hold the sums, 4 and 5 left tiles, 6 and 7
// right ones.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// The operand of ldtilecfg.
struct alignas(64) TileConfiguration {
  std::uint8_t palette;
  std::uint8_t start_row;
  std::uint8_t reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64);

constexpr std::uint16_t kTileRowBytes = 64;
constexpr TileConfiguration kTileConfiguration = {
    .palette = 1,
    .start_row = 0,
    .reserved = {},
    .row_bytes = {kTileRowBytes, kTileRowBytes, kTileRowBytes, kTileRowBytes, kTileRowBytes, kTileRowBytes,
                  kTileRowBytes, kTileRowBytes},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

/// Configures the tiles for as long as it lives: another library on this thread has its own configuration.
class Bf16Multiplier {
 public:
  static constexpr std::int64_t kMostProducts = 4;
  static constexpr std::int64_t kMostPackedBytes = std::int64_t{64} * 1024 * 1024;

  MINIQUANT_INLINE Bf16Multiplier() { _tile_loadconfig(&kTileConfiguration); }
  MINIQUANT_INLINE ~Bf16Multiplier() { _tile_release(); }
  Bf16Multiplier(const Bf16Multiplier&) = delete;
  Bf16Multiplier& operator=(const Bf16Multiplier&) = delete;

  static MINIQUANT_INLINE void begin(const float* sums, bool /*fresh*/) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    // end() writes them
    for (std::int64_t element = 0; element < 2 * kSumTile; element += kBf16Columns) {
      __builtin_prefetch(sums + element, 1);
      __builtin_prefetch(sums + kSumRow + element, 1);
    }
  }

  static MINIQUANT_INLINE void add(const Bf16Operands& operands, const float* /*sums*/) {
    const std::uint16_t* left = operands.left;
    const std::uint16_t* right = operands.right;
    // The intrinsics that load do not tell the compiler that they read memory.
    __asm__ volatile("" ::: "memory");
    for (std::int64_t block = 0; block < operands.blocks; ++block) {
      _tile_loadd(4, left, kTileRowBytes);
      _tile_loadd(6, right, kTileRowBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, right + operands.panel_stride, kTileRowBytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, left + operands.panel_stride, kTileRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      left += kBf16TileElements;
      right += kBf16TileElements;
    }
  }

  /// Adds the sums of a run to those in the workspace, so rounding does not grow with the number of runs.
  MINIQUANT_INLINE void end(float* sums, bool fresh) {
    _tile_stored(0, run_, kTileRowBytes);
    _tile_stored(1, run_ + kSumTile, kTileRowBytes);
    _tile_stored(2, run_ + 2 * kSumTile, kTileRowBytes);
    _tile_stored(3, run_ + 3 * kSumTile, kTileRowBytes);
    for (std::int64_t j = 0; j < 2; ++j) {
      for (std::int64_t element = 0; element < 2 * kSumTile; element += kBf16Columns) {
        const __m512 run = _mm512_load_ps(run_ + j * 2 * kSumTile + element);
        float* const sum = sums + j * kSumRow + element;
        _mm512_store_ps(sum, fresh ? run : _mm512_add_ps(run, _mm512_load_ps(sum)));
      }
    }
  }

 private:
  alignas(64) float run_[4 * kSumTile];  ///< tiles [j][i]
};

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
