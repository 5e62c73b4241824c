#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/grid-inl.h"
#include "kernels/kernels.h"
#include "kernels/rtn-inl.h"
#include "kernels/short_vector-inl.h"

// Scales of least squared error. Each of several factors of the widest range gives a scale; each group takes the scale
// with the least sum_j importance_j (w_j - dequantize(quantize(w_j)))^2.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// Number of partial sums of an error: the same for every instruction set, so all of them choose the same scale.
constexpr std::int64_t kPartialSums = 16;

/// The sum in float64, by halves.
template <typename T>
MINIQUANT_INLINE double sum_of(const T (&sums)[kPartialSums]) {
  static_assert(kPartialSums == 16);
  using Sixteen = ShortVector<double, 16>::type;
  const auto all =
      __builtin_convertvector(*reinterpret_cast<const ShortVector<T, kPartialSums>::unaligned*>(sums), Sixteen);
  const auto eight = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto four =
      __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  const auto two = __builtin_shufflevector(four, four, 0, 1) + __builtin_shufflevector(four, four, 2, 3);
  return two[0] + two[1];
}

/// The squared error of one weight. Multiplying by a reciprocal may round a tie the other way; the error is the same on
/// both sides of it.
template <typename T>
MINIQUANT_INLINE T squared_error_of(T weight, T scale, T reciprocal, T low, T high) {
  const T error = weight - clamp_and_round<T, T>(weight * reciprocal, low, high) * scale;
  return error * error;
}

template <typename T>
MINIQUANT_INLINE double squared_error(const CodeRange& range, const T* weight, const T* importance, std::int64_t count,
                                      T scale, std::int8_t zero_point) {
  const T low = static_cast<T>(range.code_min - zero_point);
  const T high = static_cast<T>(range.code_max - zero_point);
  const T reciprocal = T(1) / scale;
  T sums[kPartialSums] = {};
  std::int64_t i = 0;
  for (; i + kPartialSums <= count; i += kPartialSums) {
    for (std::int64_t l = 0; l < kPartialSums; ++l) {
      sums[l] += importance[i + l] * squared_error_of(weight[i + l], scale, reciprocal, low, high);
    }
  }
  for (std::int64_t l = 0; i + l < count; ++l) {
    sums[l] += importance[i + l] * squared_error_of(weight[i + l], scale, reciprocal, low, high);
  }
  return sum_of(sums);
}

template <typename T>
void search_grid(const GridView<T>& grid, const ScaleSearch<T>& search, const T* weight, std::int64_t columns,
                 std::int64_t row_begin, std::int64_t row_end) {
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    const RowScales<T> round_scale = scales_of_row(grid, row);
    for (std::int64_t group = 0; group < grid.groups; ++group) {
      const std::int64_t begin = group * grid.group_size;
      const std::int64_t count = min_of(columns - begin, grid.group_size);
      const T* const values = weight + row * columns + begin;
      T lowest;
      T highest;
      range_of(values, count, lowest, highest);
      const HeldRange<T> held = held_range(grid, row, group);
      double least = 0.0;
      for (std::int64_t factor = 0; factor < search.factor_count; ++factor) {
        T scale = T(1);
        std::int8_t zero_point = 0;
        grid_of_scaled_range(grid.range, lowest, highest, search.factors[factor], held, round_scale, scale, zero_point);
        const double error = squared_error(grid.range, values, search.importance + begin, count, scale, zero_point);
        if (factor == 0 || error < least) {
          const std::int64_t at = row * grid.groups + group;
          least = error;
          grid.scales[at] = scale;
          grid.zero_points[at] = zero_point;
        }
      }
    }
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
