// kernels/dequantize-inl.h: values of codes, against a scalar loop.

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/kernel_testing.h"

namespace miniquant::kernels::testing {
namespace {

template <typename T>
class Dequantize : public ::testing::Test {};
TYPED_TEST_SUITE(Dequantize, ElementTypes, ElementTypeNames);

constexpr std::int64_t kRows = 5;

/// A weight of random codes, scales of both signs and zero points.
template <typename T>
struct Coded {
  Coded(std::int64_t columns, std::int64_t group_size)
      : groups(ceil_div(columns, group_size)),
        codes(kRows * columns),
        zero_points(kRows * groups),
        scales(kRows * groups),
        view{columns, group_size, groups, codes.data(), scales.data(), zero_points.data()} {
    std::mt19937_64 generator(3);
    for (std::int64_t i = 0; i < kRows * columns; ++i) {
      codes[i] = static_cast<std::int8_t>(generator());
    }
    const std::vector<T> normals = normal<T>(generator, kRows * groups);
    for (std::int64_t i = 0; i < kRows * groups; ++i) {
      zero_points[i] = static_cast<std::int8_t>(generator());
      scales[i] = normals[i];
    }
  }

  [[nodiscard]] T value(std::int64_t row, std::int64_t column) const {
    const std::int64_t group = row * groups + column / view.group_size;
    return static_cast<T>(view.codes[row * view.columns + column] - view.zero_points[group]) * view.scales[group];
  }

  std::int64_t groups;
  GuardedBuffer<std::int8_t> codes;
  GuardedBuffer<std::int8_t> zero_points;
  GuardedBuffer<T> scales;
  CodesView<T> view;
};

// columns, group size: one vector of any kind less one, itself and plus one; groups that divide the columns, and not
constexpr std::int64_t kShapes[][2] = {{1, 1}, {15, 15}, {16, 16}, {17, 17}, {64, 16}, {70, 32}, {100, 7}, {9, 1}};

TYPED_TEST(Dequantize, IsThatOfAScalarLoop) {
  using T = TypeParam;
  for_each_table([&](const KernelTable& table) {
    for (const auto& [columns, group_size] : kShapes) {
      const Coded<T> coded(columns, group_size);
      GuardedBuffer<T> values(kRows * columns);
      typed_kernels<T>(table).dequantize(coded.view, 0, 2, values.data());
      typed_kernels<T>(table).dequantize(coded.view, 2, kRows, values.data());
      for (std::int64_t row = 0; row < kRows; ++row) {
        for (std::int64_t column = 0; column < columns; ++column) {
          ASSERT_EQ(values[row * columns + column], coded.value(row, column)) << columns << " " << row << " " << column;
        }
      }
    }
  });
}

TEST(DequantizeToBf16, IsTheNearestValue) {
  for_each_table([&](const KernelTable& table) {
    for (const auto& [columns, group_size] : kShapes) {
      const Coded<float> coded(columns, group_size);
      GuardedBuffer<std::uint16_t> values(kRows * columns);
      table.dequantize_to_bf16(coded.view, 0, kRows, values.data());
      for (std::int64_t i = 0; i < kRows * columns; ++i) {
        const float exact = coded.value(i / columns, i % columns);
        const auto found = std::bit_cast<float>(static_cast<std::uint32_t>(values[i]) << 16U);
        const float below = std::bit_cast<float>(std::bit_cast<std::uint32_t>(exact) & 0xFFFF0000U);
        const float above = std::bit_cast<float>((std::bit_cast<std::uint32_t>(exact) | 0xFFFFU) + 1U);
        const double to_below = std::abs(double{exact} - double{below});
        const double to_above = std::abs(double{above} - double{exact});
        if (below == exact || to_below < to_above) {
          ASSERT_EQ(found, below) << exact;
        } else if (to_above < to_below) {
          ASSERT_EQ(found, above) << exact;
        } else {
          ASSERT_EQ(values[i] % 2, 0) << exact;
        }
      }
    }
  });
}

}  // namespace
}  // namespace miniquant::kernels::testing
