// kernels/rtn-inl.h: the grid of every group and rounding to it, against a scalar loop.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/kernel_testing.h"

namespace miniquant::kernels::testing {
namespace {

struct Shape {
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t group_size;
};

constexpr Shape kShapes[] = {
    {1, 1, 1},     // one weight
    {3, 5, 1},     // a group per weight
    {2, 17, 16},   // one AVX-512 vector of float32, and a group of one
    {3, 100, 33},  // groups of a vector plus one, a shorter last group
    {2, 130, 64},  // the lab's groups, a last group of two
    {5, 63, 63},   // one group per row, a last vector partly filled
    {97, 12, 4},   // a panel plus one row
};

constexpr CodeRange kRanges[] = {{-1, 1, true},  {-7, 7, true},  {-127, 127, true},
                                 {-2, 1, false}, {-8, 7, false}, {-128, 127, false}};

template <typename T>
class Rtn : public ::testing::Test {};
TYPED_TEST_SUITE(Rtn, ElementTypes, ElementTypeNames);

TYPED_TEST(Rtn, LargestMagnitudesAreThoseOfAScalarLoop) {
  using T = TypeParam;
  constexpr std::int64_t kRows = 3;
  std::mt19937_64 generator(3);
  for (const std::int64_t columns : {0, 1, 7, 8, 15, 16, 17, 64, 70}) {
    // The largest of row 0 is positive, that of row 1 negative, at each column in turn; row 2 is left as it is.
    for (std::int64_t at = 0; at < std::max<std::int64_t>(columns, 1); ++at) {
      std::vector<T> values = normal<T>(generator, kRows * columns, 1.0);
      if (columns > 0) {
        values[static_cast<std::size_t>(at)] = T(100);
        values[static_cast<std::size_t>(columns + at)] = T(-100);
      }
      const GuardedBuffer<T> weight(values);
      for_each_instruction_set<T>([&](const auto& kernel) {
        GuardedBuffer<T> largest(kRows);
        kernel.largest_magnitudes(weight.data(), columns, 0, kRows, largest.data());
        for (std::int64_t row = 0; row < kRows; ++row) {
          T expected = T(0);
          for (std::int64_t i = 0; i < columns; ++i) {
            expected = std::max(expected, std::abs(weight.data()[row * columns + i]));
          }
          EXPECT_EQ(largest.data()[row], expected) << row << " of " << columns << " columns, at " << at;
        }
      });
    }
  }
}

TYPED_TEST(Rtn, ScalesAndCodesAreThoseOfAScalarLoop) {
  using T = TypeParam;
  std::mt19937_64 generator(1);
  for (const Shape& shape : kShapes) {
    const auto [rows, columns, group_size] = shape;
    const std::int64_t groups = (columns + group_size - 1) / group_size;
    const GuardedBuffer<T> weight(normal<T>(generator, rows * columns, 0.02));
    for (const CodeRange& range : kRanges) {
      for_each_instruction_set<T>([&](const auto& kernel) {
        SCOPED_TRACE(::testing::Message() << rows << " x " << columns << ", groups of " << group_size << ", codes "
                                          << range.code_min << " to " << range.code_max);
        GuardedBuffer<T> scales(rows * groups);
        GuardedBuffer<std::int8_t> zero_points(rows * groups);
        GuardedBuffer<std::int8_t> codes(rows * columns);
        const GridView<T> grid{range,        group_size,    groups, scales.data(), zero_points.data(),
                               codes.data(), no_rounding<T>};
        kernel.compute_grid(grid, weight.data(), columns, 0, rows);
        kernel.round_to_nearest(grid, weight.data(), columns, 0, rows);

        for (std::int64_t row = 0; row < rows; ++row) {
          for (std::int64_t group = 0; group < groups; ++group) {
            const T* const values = weight.data() + row * columns + group * group_size;
            const std::int64_t count = std::min(group_size, columns - group * group_size);
            const auto [lowest, highest] = std::minmax_element(values, values + count);
            const T scale = scales[row * groups + group];
            const T zero_point = zero_points[row * groups + group];
            if (range.symmetric) {
              ASSERT_EQ(scale, std::max(*highest, -*lowest) / static_cast<T>(range.code_max));
              ASSERT_EQ(zero_point, T(0));
            } else {
              const Wide<T> low = std::min<Wide<T>>(*lowest, 0);
              const Wide<T> high = std::max<Wide<T>>(*highest, 0);
              const Wide<T> expected = (high - low) / (range.code_max - range.code_min);
              // The difference and the division are each rounded once, by half a unit.
              ASSERT_NEAR(static_cast<double>(scale), static_cast<double>(expected),
                          static_cast<double>(1.01 * kEps<T> * expected));
              ASSERT_EQ(zero_point,
                        static_cast<T>(range.code_min) + std::clamp(std::nearbyint(static_cast<T>(-low) / scale), T(0),
                                                                    static_cast<T>(range.code_max - range.code_min)));
            }
            for (std::int64_t i = 0; i < count; ++i) {
              const T code = std::clamp(std::nearbyint(values[i] / scale) + zero_point, static_cast<T>(range.code_min),
                                        static_cast<T>(range.code_max));
              ASSERT_EQ(static_cast<T>(codes[row * columns + group * group_size + i]), code) << row << ", " << i;
            }
          }
        }
      });
    }
  }
}

TYPED_TEST(Rtn, TouchesTheRowsItIsGivenAndNoOthers) {
  using T = TypeParam;
  constexpr std::int64_t kRows = 5;
  constexpr std::int64_t kColumns = 6;
  std::mt19937_64 generator(2);
  const GuardedBuffer<T> weight(normal<T>(generator, kRows * kColumns));
  for_each_instruction_set<T>([&](const auto& kernel) {
    GuardedBuffer<T> scales(std::vector<T>(kRows * 2, T(-1)));
    GuardedBuffer<std::int8_t> zero_points(std::vector<std::int8_t>(kRows * 2, 99));
    GuardedBuffer<std::int8_t> codes(std::vector<std::int8_t>(kRows * kColumns, 99));
    const GridView<T> grid{{-7, 7, true}, 4, 2, scales.data(), zero_points.data(), codes.data(), no_rounding<T>};
    kernel.compute_grid(grid, weight.data(), kColumns, 1, 3);
    kernel.round_to_nearest(grid, weight.data(), kColumns, 1, 3);
    for (std::int64_t row = 0; row < kRows; ++row) {
      const bool given = row == 1 || row == 2;
      for (std::int64_t group = 0; group < 2; ++group) {
        EXPECT_EQ(scales[row * 2 + group] > T(0), given);
        EXPECT_EQ(zero_points[row * 2 + group] == 0, given);
      }
      for (std::int64_t column = 0; column < kColumns; ++column) {
        EXPECT_EQ(codes[row * kColumns + column] != 99, given);
      }
    }
  });
}

}  // namespace
}  // namespace miniquant::kernels::testing
