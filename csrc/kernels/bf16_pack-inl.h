#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/bf16.h"
#include "kernels/short_vector-inl.h"
#include "kernels/target-inl.h"
#include "kernels/transpose-inl.h"

// Tokens as packed tiles of bfloat16 parts: kernels/bf16.h.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

constexpr std::int64_t kPairsPerTile = kBf16Tokens / 2;
constexpr std::int64_t kWordsPerTile = kBf16TileElements / 2;
constexpr std::int64_t kMaxParts = 3;

using PackFloats = ShortVector<float, kBf16Columns>;
using PackWords = ShortVector<std::uint32_t, kBf16Columns>;
using PackHalves = ShortVector<std::uint16_t, kBf16Columns>;

/// The values of a row as the bits of float32.
MINIQUANT_INLINE PackWords::type bits_of(const std::uint16_t* row) {
  return __builtin_convertvector(*reinterpret_cast<const PackHalves::unaligned*>(row), PackWords::type) << 16;
}
MINIQUANT_INLINE PackWords::type bits_of(const float* row) {
  return *reinterpret_cast<const PackWords::unaligned*>(row);
}

/// The same for the `width` values that there are, and 0 after them.
template <typename T>
MINIQUANT_INLINE PackWords::type bits_of(const T* row, std::int64_t width) {
  if (width >= kBf16Columns) {
    return bits_of(row);
  }
  T values[kBf16Columns] = {};
  for (std::int64_t c = 0; c < width; ++c) {
    values[c] = row[c];
  }
  return bits_of(values);
}

/// Words of pairs [pair][column] of up to kMaxParts parts.
struct PairedTile {
  alignas(64) std::uint32_t part[kMaxParts][kWordsPerTile];

  /// Splits a pair of tokens: the leading bits, then those of the remainder, which is exact.
  MINIQUANT_INLINE void set_pair(std::int64_t pair, PackWords::type even, PackWords::type odd, std::int64_t parts) {
    constexpr std::uint32_t kLeadingBits = 0xFFFF0000;
    for (std::int64_t p = 0;; ++p) {
      const PackWords::type even_leading = even & kLeadingBits;
      const PackWords::type odd_leading = odd & kLeadingBits;
      *reinterpret_cast<PackWords::unaligned*>(part[p] + pair * kBf16Columns) = odd_leading | (even_leading >> 16);
      if (p + 1 == parts) {
        return;
      }
      even = remainder(even, even_leading);
      odd = remainder(odd, odd_leading);
    }
  }

 private:
  static MINIQUANT_INLINE PackWords::type remainder(PackWords::type value, PackWords::type leading) {
    return reinterpret_cast<PackWords::type>(reinterpret_cast<PackFloats::type>(value) -
                                             reinterpret_cast<PackFloats::type>(leading));
  }
};

MINIQUANT_INLINE void copy_tile(const std::uint32_t* from, std::uint16_t* to) {
#pragma GCC unroll 4
  for (std::int64_t pair = 0; pair < kPairsPerTile; ++pair) {
    *reinterpret_cast<PackWords::unaligned*>(to + pair * kBf16Tokens) =
        *reinterpret_cast<const PackWords::unaligned*>(from + pair * kBf16Columns);
  }
}

/// to[column][pair] = from[pair][column]. A pair of tokens moves like one float32 value.
MINIQUANT_INLINE void transpose_tile(const std::uint32_t* from, std::uint16_t* to) {
  constexpr std::int64_t kStep = kBlock<float>;
  for (std::int64_t pair = 0; pair < kPairsPerTile; pair += kStep) {
    for (std::int64_t column = 0; column < kBf16Columns; column += kStep) {
      transpose_block(reinterpret_cast<const float*>(from + pair * kBf16Columns + column), kBf16Columns,
                      reinterpret_cast<float*>(to + column * kBf16Tokens + 2 * pair), kPairsPerTile);
    }
  }
}

/// The float32 values of `bits` times a weight, as bits.
MINIQUANT_INLINE PackWords::type times(PackWords::type bits, float weight) {
  return reinterpret_cast<PackWords::type>(reinterpret_cast<PackFloats::type>(bits) * weight);
}

/// Packs two panels at a time, whose bfloat16 values share cache lines.
template <typename T>
void pack_tokens(const T* rows, const float* weights, Bf16Layout layout, std::int64_t block, Bf16Parts left,
                 Bf16Parts right) {
  const std::int64_t first = block * kBf16Tokens;
  const std::int64_t tokens = min_of(layout.tokens - first, kBf16Tokens);
  const bool weighted = weights != nullptr;
  const std::int64_t parts = weighted || left.count > right.count ? left.count : right.count;
  const auto weight_of = [&](std::int64_t token) { return token < tokens ? weights[first + token] : 0.0F; };
  PairedTile tiles[2];
  PairedTile weighted_tiles[2];
  for (std::int64_t panel = 0; panel < layout.panels(); panel += 2) {
    const auto values_of = [&](std::int64_t half, std::int64_t token) {
      const std::int64_t column = (panel + half) * kBf16Columns;
      return token < tokens ? bits_of(rows + token * layout.columns + column, layout.columns - column)
                            : PackWords::type{};
    };
    for (std::int64_t pair = 0; pair < kPairsPerTile; ++pair) {
      const std::int64_t token = 2 * pair;
      for (std::int64_t half = 0; half < 2; ++half) {
        const PackWords::type even = values_of(half, token);
        const PackWords::type odd = values_of(half, token + 1);
        tiles[half].set_pair(pair, even, odd, parts);
        if (weighted) {
          weighted_tiles[half].set_pair(pair, times(even, weight_of(token)), times(odd, weight_of(token + 1)),
                                        right.count);
        }
      }
    }
    for (std::int64_t half = 0; half < 2; ++half) {
      const std::int64_t offset = layout.offset(panel + half, block);
      for (std::int64_t p = 0; p < left.count; ++p) {
        transpose_tile(tiles[half].part[p], left.values + p * layout.size() + offset);
      }
      for (std::int64_t p = 0; p < right.count; ++p) {
        copy_tile((weighted ? weighted_tiles : tiles)[half].part[p], right.values + p * layout.size() + offset);
      }
    }
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
