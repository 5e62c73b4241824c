#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/grid-inl.h"
#include "kernels/kernels.h"
#include "kernels/vector-inl.h"

// The scales of a weight's groups, and rounding to nearest with them.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// Smallest and largest of `count` >= 1 values.
template <typename T>
MINIQUANT_INLINE void range_of(const T* values, std::int64_t count, T& lowest, T& highest) {
  lowest = values[0];
  highest = values[0];
  std::int64_t i = 0;
  if (count >= kLanes<T>) {
    Vector<T> low = load<T>(values);
    Vector<T> high = low;
    for (i = kLanes<T>; i + kLanes<T> <= count; i += kLanes<T>) {
      const Vector<T> value = load<T>(values + i);
      low = value < low ? value : low;
      high = value > high ? value : high;
    }
    for (std::int64_t lane = 0; lane < kLanes<T>; ++lane) {
      lowest = low[lane] < lowest ? low[lane] : lowest;
      highest = high[lane] > highest ? high[lane] : highest;
    }
  }
  for (; i < count; ++i) {
    lowest = values[i] < lowest ? values[i] : lowest;
    highest = values[i] > highest ? values[i] : highest;
  }
}

template <typename T>
void largest_magnitudes(const T* weight, std::int64_t columns, std::int64_t row_begin, std::int64_t row_end,
                        T* largest) {
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    T lowest = T(0);
    T highest = T(0);
    if (columns > 0) {
      range_of(weight + row * columns, columns, lowest, highest);
    }
    largest[row] = highest > -lowest ? highest : -lowest;
  }
}

template <typename T>
void compute_grid(const GridView<T>& grid, const T* weight, std::int64_t columns, std::int64_t row_begin,
                  std::int64_t row_end) {
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    const RowScales<T> round_scale = scales_of_row(grid, row);
    for (std::int64_t group = 0; group < grid.groups; ++group) {
      const std::int64_t begin = group * grid.group_size;
      const std::int64_t rest = columns - begin;
      T lowest;
      T highest;
      range_of(weight + row * columns + begin, min_of(rest, grid.group_size), lowest, highest);
      const std::int64_t at = row * grid.groups + group;
      grid_of_range(grid.range, lowest, highest, round_scale, grid.scales[at], grid.zero_points[at]);
    }
  }
}

template <typename T>
void round_to_nearest(const GridView<T>& grid, const T* weight, std::int64_t columns, std::int64_t row_begin,
                      std::int64_t row_end) {
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    for (std::int64_t group = 0; group < grid.groups; ++group) {
      const std::int64_t begin = group * grid.group_size;
      const std::int64_t rest = columns - begin;
      const std::int64_t count = min_of(rest, grid.group_size);
      const T* values = weight + row * columns + begin;
      std::int8_t* codes = grid.codes + row * columns + begin;
      const T scale = grid.scales[row * grid.groups + group];
      const T zero_point = static_cast<T>(grid.zero_points[row * grid.groups + group]);
      const T low = static_cast<T>(grid.range.code_min) - zero_point;
      const T high = static_cast<T>(grid.range.code_max) - zero_point;
      for (std::int64_t i = 0; i < count; ++i) {
        const T level = round_to_level<T, T>(values[i], scale, low, high);
        codes[i] = static_cast<std::int8_t>(static_cast<std::int32_t>(level + zero_point));
      }
    }
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
