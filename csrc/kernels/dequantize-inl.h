#pragma once

#include <bit>
#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/kernels.h"
#include "kernels/target-inl.h"

// The values of codes: the inverse of the grid.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// A value as it is stored.
template <typename T>
MINIQUANT_INLINE void store_value(T value, T& stored) {
  stored = value;
}

/// The bits of the nearest bfloat16 value, ties to even; of a NaN those of a quiet one.
MINIQUANT_INLINE void store_value(float value, std::uint16_t& stored) {
  constexpr std::uint32_t kMagnitude = 0x7FFF'FFFF;
  constexpr std::uint32_t kInfinity = 0x7F80'0000;
  constexpr std::uint32_t kQuietNan = 0x7FC0;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t leading = bits >> 16U;
  const std::uint32_t rounded = (bits + 0x7FFF + (leading & 1U)) >> 16U;
  stored = static_cast<std::uint16_t>((bits & kMagnitude) > kInfinity ? kQuietNan : rounded);
}

/// values = (code - zero point) * scale, rounded to T and then as stored, for rows [row_begin, row_end).
template <typename T, typename Stored>
void dequantize(const CodesView<T>& codes, std::int64_t row_begin, std::int64_t row_end, Stored* values) {
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    for (std::int64_t group = 0; group < codes.groups; ++group) {
      const std::int64_t begin = group * codes.group_size;
      const std::int64_t rest = codes.columns - begin;
      const std::int64_t count = min_of(rest, codes.group_size);
      const T scale = codes.scales[row * codes.groups + group];
      const std::int8_t zero_point = codes.zero_points[row * codes.groups + group];
      const std::int8_t* const code = codes.codes + row * codes.columns + begin;
      Stored* const value = values + row * codes.columns + begin;
      for (std::int64_t i = 0; i < count; ++i) {
        store_value(static_cast<T>(code[i] - zero_point) * scale, value[i]);
      }
    }
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
