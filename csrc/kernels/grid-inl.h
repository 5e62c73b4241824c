#pragma once

#include <cstdint>

#include "kernels/kernels.h"
#include "kernels/target-inl.h"

// The grid: how a scale is computed from a range, and how a value is rounded. All kernels do both here.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

template <typename T>
constexpr T kRoundToInteger = T(0);
template <>
constexpr float kRoundToInteger<float> = 12582912.0F;  // 1.5 * 2^23
template <>
constexpr double kRoundToInteger<double> = 6755399441055744.0;  // 1.5 * 2^52

/// clamp(round(level), low, high), ties to even; `low` for NaN. V is T or a vector of T. Clamping first leaves a
/// magnitude of at most 255, where adding and subtracting 1.5 * 2^(mantissa bits) rounds to the nearest integer.
template <typename T, typename V>
MINIQUANT_INLINE V clamp_and_round(V level, V low, V high) {
  level = level > low ? level : low;
  level = level < high ? level : high;
  return (level + kRoundToInteger<T>)-kRoundToInteger<T>;
}

/// The level of a value. It divides, because multiplying by a reciprocal rounds ties differently.
template <typename T, typename V>
MINIQUANT_INLINE V round_to_level(V value, V scale, V low, V high) {
  return clamp_and_round<T, V>(value / scale, low, high);
}

/// How the scales of one row are rounded.
template <typename T>
struct RowScales {
  RoundScale<T> round;
  T unit;
  T inverse_unit;  // exact: a unit is a power of two

  /// A positive scale, rounded as it is stored, in the row's units.
  MINIQUANT_INLINE T operator()(T scale, std::int32_t levels) const {
    return round(scale * unit, levels) * inverse_unit;
  }
};

template <typename T>
MINIQUANT_INLINE RowScales<T> scales_of_row(const GridView<T>& grid, std::int64_t row) {
  if (grid.units == nullptr) {
    return {grid.round_scale, T(1), T(1)};
  }
  return {grid.round_scale, grid.units[row], T(1) / grid.units[row]};
}

/// The weights of a group that its scale must not clip.
template <typename T>
struct HeldRange {
  T lowest;   // at most 0
  T highest;  // at least 0

  [[nodiscard]] MINIQUANT_INLINE bool is_empty() const { return lowest == T(0) && highest == T(0); }
};

template <typename T>
MINIQUANT_INLINE HeldRange<T> held_range(const GridView<T>& grid, std::int64_t row, std::int64_t group) {
  if (grid.held == nullptr) {
    return {T(0), T(0)};
  }
  const T* const held = grid.held + 2 * (row * grid.groups + group);
  return {held[0], held[1]};
}

/// The least magnitude of a scale of this sign with which the grid reaches from one end of `held` to the other.
template <typename T>
MINIQUANT_INLINE T least_scale(const CodeRange& range, std::int8_t zero_point, HeldRange<T> held, bool positive) {
  const T above = static_cast<T>(positive ? range.code_max - zero_point : zero_point - range.code_min);
  const T below = static_cast<T>(positive ? zero_point - range.code_min : range.code_max - zero_point);
  const T for_highest = held.highest > T(0) && above > T(0) ? held.highest / above : T(0);
  const T for_lowest = held.lowest < T(0) && below > T(0) ? -held.lowest / below : T(0);
  return for_highest > for_lowest ? for_highest : for_lowest;
}

/// The largest distance of a code from the zero point, which lies `offset` above the smallest code.
MINIQUANT_INLINE std::int32_t levels_beside(const CodeRange& range, std::int32_t offset) {
  const std::int32_t above = range.code_max - range.code_min - offset;
  return offset > above ? offset : above;
}

/// Scale and zero point of a group whose weights lie in [lowest, highest].
template <typename T>
MINIQUANT_INLINE void grid_of_range(const CodeRange& range, T lowest, T highest, RowScales<T> round_scale, T& scale,
                                    std::int8_t& zero_point) {
  zero_point = 0;
  if (range.symmetric) {
    const T largest = highest > -lowest ? highest : -lowest;
    scale = largest == T(0) ? T(1) : round_scale(largest / static_cast<T>(-range.code_min), -range.code_min);
    // The side with one more code is that of the largest weight.
    scale = -range.code_min > range.code_max && highest > -lowest ? -scale : scale;
    return;
  }
  lowest = lowest < T(0) ? lowest : T(0);
  highest = highest > T(0) ? highest : T(0);
  if (lowest == highest) {
    scale = T(1);
    return;
  }
  // Halved, because the range of the largest weights overflows.
  const T half = T(0.5);
  const T steps = static_cast<T>(range.code_max - range.code_min);
  const T exact = (highest * half - lowest * half) / (steps * half);
  const auto offset_with = [&](T used) {
    return static_cast<std::int32_t>(round_to_level<T, T>(-lowest, used, T(0), steps));
  };
  const std::int32_t levels = levels_beside(range, offset_with(exact));
  scale = round_scale(exact, levels);
  std::int32_t offset = offset_with(scale);
  if (levels_beside(range, offset) > levels) {
    // Rounding has moved the zero point, and with it the largest distance of a code.
    scale = round_scale(exact, levels_beside(range, offset));
    offset = offset_with(scale);
  }
  zero_point = static_cast<std::int8_t>(range.code_min + offset);
}

/// The same for a range `factor` times as wide that includes `held`; a negative `factor` gives the scale the other
/// sign.
template <typename T>
MINIQUANT_INLINE void grid_of_scaled_range(const CodeRange& range, T lowest, T highest, T factor, HeldRange<T> held,
                                           RowScales<T> round_scale, T& scale, std::int8_t& zero_point) {
  const T width = factor < T(0) ? -factor : factor;
  lowest *= width;
  highest *= width;
  if (!held.is_empty()) [[unlikely]] {
    lowest = lowest < held.lowest ? lowest : held.lowest;
    highest = highest > held.highest ? highest : held.highest;
  }
  grid_of_range(range, lowest, highest, round_scale, scale, zero_point);
  scale = factor < T(0) ? -scale : scale;
  if (held.is_empty()) [[likely]] {
    return;
  }
  // The range may be held with the other sign only, or with another zero point.
  const bool positive = scale > T(0);
  const T least = least_scale(range, zero_point, held, positive);
  if ((positive ? scale : -scale) < least) {
    const T wider = round_scale(least, levels_beside(range, zero_point - range.code_min));
    scale = positive ? wider : -wider;
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
