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
  static constexpr std::int64_t kMostSquarePanels = 32;
  static constexpr std::int64_t kMostPackedBytes = std::int64_t{128} * 1024 * 1024;

  MINIQUANT_INLINE Bf16Multiplier() { _tile_loadconfig(&kTileConfiguration); }
  MINIQUANT_INLINE ~Bf16Multiplier() {
    add_waiting(0, kLines);
    _tile_release();
  }
  Bf16Multiplier(const Bf16Multiplier&) = delete;
  Bf16Multiplier& operator=(const Bf16Multiplier&) = delete;

  static MINIQUANT_INLINE void begin(Bf16Sums /*sums*/, bool /*fresh*/) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  /// A product loads what the one before it did not: best is an order in which adjacent ones share a part.
  MINIQUANT_INLINE void add(const Bf16Operands& operands, const Bf16Product* products, std::int64_t count,
                            Bf16Sums /*sums*/) {
    // The intrinsics that load do not tell the compiler that they read memory.
    __asm__ volatile("" ::: "memory");
    for (std::int64_t block = 0; block < operands.blocks; ++block) {
      Bf16Product loaded = {-1, -1};
      for (std::int64_t p = 0; p < count; ++p) {
        const Bf16Operands now = operands_of(operands, products[p]);
        if (products[p].left != loaded.left) {
          // Not into the first-level cache, where the right panels stay.
          const std::uint16_t* const left = now.left + block * kBf16TileElements;
          _tile_stream_loadd(4, left, kTileRowBytes);
          _tile_stream_loadd(5, left + now.panel_stride, kTileRowBytes);
        }
        if (products[p].right != loaded.right) {
          const std::uint16_t* const right = now.right + block * kBf16TileElements;
          _tile_loadd(6, right, kTileRowBytes);
          _tile_loadd(7, right + now.panel_stride, kTileRowBytes);
        }
        loaded = products[p];
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      add_waiting(block * kLinesPerBlock, (block + 1) * kLinesPerBlock);
    }
    add_waiting(operands.blocks * kLinesPerBlock, kLines);
    waiting_.first = nullptr;
  }

  /// The sums of a run are added to those in the workspace, so rounding does not grow with the number of runs. They
  /// wait for that until the next products are under way.
  MINIQUANT_INLINE void end(Bf16Sums sums, bool fresh) {
    _tile_stored(0, run_, kTileRowBytes);
    _tile_stored(1, run_ + kSumTile, kTileRowBytes);
    _tile_stored(2, run_ + 2 * kSumTile, kTileRowBytes);
    _tile_stored(3, run_ + 3 * kSumTile, kTileRowBytes);
    waiting_ = sums;
    waiting_fresh_ = fresh;
  }

 private:
  static constexpr std::int64_t kLines = 4 * kSumTile / kBf16Columns;
  static constexpr std::int64_t kLinesPerBlock = kLines / kBf16RunBlocks;

  /// Adds rows [first, last) of the four tiles to the sums that wait for them, if any do.
  MINIQUANT_INLINE void add_waiting(std::int64_t first, std::int64_t last) const {
    if (waiting_.first == nullptr) {
      return;
    }
    for (std::int64_t line = first; line < last; ++line) {
      const std::int64_t element = line * kBf16Columns;
      const __m512 run = _mm512_load_ps(run_ + element);
      float* const sum = waiting_.tile(element / (2 * kSumTile), 0) + element % (2 * kSumTile);
      _mm512_store_ps(sum, waiting_fresh_ ? run : _mm512_add_ps(run, _mm512_load_ps(sum)));
    }
  }

  alignas(64) float run_[4 * kSumTile];  ///< tiles [j][i]
  Bf16Sums waiting_ = {};                ///< the sums that run_ is for, if any
  bool waiting_fresh_ = false;
};

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
