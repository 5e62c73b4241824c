#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/grid-inl.h"
#include "kernels/kernels.h"
#include "kernels/rtn-inl.h"
#include "kernels/short_vector-inl.h"
#include "kernels/vector-inl.h"

// Scales of least squared error. Each of several factors of the widest range gives a scale; each group takes the scale
// with the least sum_j importance_j (w_j - dequantize(quantize(w_j)))^2.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// Number of partial sums of an error: the same for every instruction set, so all of them choose the same scale.
constexpr std::int64_t kPartialSums = 16;

/// Vectors that hold them.
template <typename T>
constexpr std::int64_t kSumVectors = kPartialSums / kLanes<T>;

/// Scales that are tried side by side, so that each waits for its sums while the others are computed.
template <typename T>
constexpr std::int64_t kTrials = kSumVectors<T> >= 4 ? 1 : 4 / kSumVectors<T>;

/// The sum in float64, by halves.
template <typename T>
MINIQUANT_INLINE double sum_of(const Vector<T> (&sums)[kSumVectors<T>]) {
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

/// Some scales of one group, with their zero points.
template <typename T>
struct Trials {
  T scale[kTrials<T>];
  std::int8_t zero_point[kTrials<T>];
};

/// sums += importance * (weight - value)^2 for kPartialSums columns and each of the scales. Multiplying by a reciprocal
/// may round a tie the other way; the error is the same on both sides of it.
template <typename T>
MINIQUANT_INLINE void add_squared_errors(const CodeRange& range, const Trials<T>& trials, const T* weight,
                                         const T* importance, Vector<T> (&sums)[kTrials<T>][kSumVectors<T>]) {
#pragma GCC unroll 4
  for (std::int64_t trial = 0; trial < kTrials<T>; ++trial) {
    const Vector<T> low = broadcast<T>(static_cast<T>(range.code_min - trials.zero_point[trial]));
    const Vector<T> high = broadcast<T>(static_cast<T>(range.code_max - trials.zero_point[trial]));
    const Vector<T> scale = broadcast<T>(trials.scale[trial]);
    const Vector<T> reciprocal = broadcast<T>(T(1) / trials.scale[trial]);
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < kSumVectors<T>; ++v) {
      const Vector<T> value = load<T>(weight + v * kLanes<T>);
      const Vector<T> error = value - clamp_and_round<T, Vector<T>>(value * reciprocal, low, high) * scale;
      sums[trial][v] += load<T>(importance + v * kLanes<T>) * (error * error);
    }
  }
}

/// errors[trial] = sum_j importance_j (w_j - dequantize(quantize(w_j)))^2 of `count` columns.
template <typename T>
MINIQUANT_INLINE void squared_errors(const CodeRange& range, const Trials<T>& trials, const T* weight,
                                     const T* importance, std::int64_t count, double (&errors)[kTrials<T>]) {
  Vector<T> sums[kTrials<T>][kSumVectors<T>] = {};
  std::int64_t i = 0;
  for (; i + kPartialSums <= count; i += kPartialSums) {
    add_squared_errors(range, trials, weight + i, importance + i, sums);
  }
  if (i < count) {
    // Weights of 0 have no error.
    T last_weight[kPartialSums] = {};
    T last_importance[kPartialSums] = {};
    for (std::int64_t l = 0; i + l < count; ++l) {
      last_weight[l] = weight[i + l];
      last_importance[l] = importance[i + l];
    }
    add_squared_errors(range, trials, last_weight, last_importance, sums);
  }
#pragma GCC unroll 4
  for (std::int64_t trial = 0; trial < kTrials<T>; ++trial) {
    errors[trial] = sum_of<T>(sums[trial]);
  }
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
      const std::int64_t at = row * grid.groups + group;
      double least = 0.0;
      for (std::int64_t factor = 0; factor < search.factor_count; factor += kTrials<T>) {
        Trials<T> trials;
        for (std::int64_t trial = 0; trial < kTrials<T>; ++trial) {
          // Past the last factor that one again, which is not chosen: it has no smaller error than itself.
          const T width = search.factors[min_of(factor + trial, search.factor_count - 1)];
          grid_of_scaled_range(grid.range, lowest, highest, width, held, round_scale, trials.scale[trial],
                               trials.zero_point[trial]);
        }
        double errors[kTrials<T>];
        squared_errors(grid.range, trials, values, search.importance + begin, count, errors);
        for (std::int64_t trial = 0; trial < kTrials<T>; ++trial) {
          if (factor + trial == 0 || errors[trial] < least) {
            least = errors[trial];
            grid.scales[at] = trials.scale[trial];
            grid.zero_points[at] = trials.zero_point[trial];
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
