#pragma once

#include <cstdint>

#include "kernels/bf16.h"
#include "kernels/target-inl.h"

// What a unit multiplies, and where the sums are.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

constexpr std::int64_t kSumTile = kBf16Columns * kBf16Columns;

/// The sums of a square: tiles [panels][panels], each [kBf16Columns][kBf16Columns]; from one of them on.
struct Bf16Sums {
  float* first;
  std::int64_t panels;

  [[nodiscard]] MINIQUANT_INLINE float* tile(std::int64_t j, std::int64_t i) const {
    return first + (j * panels + i) * kSumTile;
  }
};

/// Packed tiles [2][blocks] of the parts of each side; a panel begins `panel_stride` after the one before, a part its
/// side's stride.
struct Bf16Operands {
  const std::uint16_t* left;
  const std::uint16_t* right;
  const std::uint16_t* next_left;  ///< what `left` will be in the next call, to fetch it early
  std::int64_t panel_stride;
  std::int64_t left_part_stride;
  std::int64_t right_part_stride;
  std::int64_t blocks;
};

/// The same operands of one product alone.
MINIQUANT_INLINE Bf16Operands operands_of(const Bf16Operands& operands, Bf16Product product) {
  const std::int64_t left = product.left * operands.left_part_stride;
  Bf16Operands of_product = operands;
  of_product.left += left;
  of_product.next_left += left;
  of_product.right += product.right * operands.right_part_stride;
  return of_product;
}

/// For units whose add() adds to the sums in memory: these are 0 at the beginning, and complete at the end.
struct AddsInMemory {
  /// Blocks whose sum is added at once: short sums, so rounding does not grow with the number of tokens.
  static constexpr std::int64_t kBlocksPerSum = 4;

  static MINIQUANT_INLINE void begin(Bf16Sums sums, bool fresh) {
    for (std::int64_t j = 0; fresh && j < 2; ++j) {
      for (std::int64_t element = 0; element < 2 * kSumTile; ++element) {
        sums.tile(j, 0)[element] = 0.0F;
      }
    }
  }

  static MINIQUANT_INLINE void end(Bf16Sums /*sums*/, bool /*fresh*/) {}
};

/// add() for units that add one product at a time, Unit::add_product(operands, sums).
template <typename Unit>
class AddsProductByProduct : public AddsInMemory {
 public:
  static MINIQUANT_INLINE void add(const Bf16Operands& operands, const Bf16Product* products, std::int64_t count,
                                   Bf16Sums sums) {
    for (std::int64_t p = 0; p < count; ++p) {
      Unit::add_product(operands_of(operands, products[p]), sums);
    }
  }

 private:
  AddsProductByProduct() = default;
  friend Unit;
};

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
