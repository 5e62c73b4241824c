// kernels/grid-inl.h, tested through the kernels that use it.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/kernel_testing.h"

namespace miniquant::kernels::testing {
namespace {

constexpr CodeRange kSymmetric8 = {-127, 127, true};
constexpr CodeRange kAsymmetric8 = {-128, 127, false};

template <typename T>
class Grid : public ::testing::Test {
 protected:
  struct ScaleAndZero {
    T scale;
    int zero_point;
  };

  static ScaleAndZero grid_of(const TypedKernels<T>& kernel, const CodeRange& range, const std::vector<T>& group) {
    const GuardedBuffer<T> weight(group);
    GuardedBuffer<T> scale(1);
    GuardedBuffer<std::int8_t> zero_point(1);
    const auto columns = static_cast<std::int64_t>(group.size());
    kernel.compute_grid({range, columns, 1, scale.data(), zero_point.data(), nullptr, no_rounding<T>}, weight.data(),
                        columns, 0, 1);
    return {scale[0], zero_point[0]};
  }

  static std::vector<int> round(const TypedKernels<T>& kernel, const CodeRange& range, const std::vector<T>& values,
                                T scale, std::int8_t zero_point = 0) {
    const GuardedBuffer<T> weight(values);
    const auto columns = static_cast<std::int64_t>(values.size());
    GuardedBuffer<std::int8_t> codes(columns);
    kernel.round_to_nearest({range, columns, 1, &scale, &zero_point, codes.data(), no_rounding<T>}, weight.data(),
                            columns, 0, 1);
    const std::vector<std::int8_t> bytes = codes.values();
    return {bytes.begin(), bytes.end()};
  }
};
TYPED_TEST_SUITE(Grid, ElementTypes, ElementTypeNames);

TYPED_TEST(Grid, RoundsTiesToEven) {
  using T = TypeParam;
  for_each_instruction_set<T>([&](const auto& kernel) {
    const std::vector<T> halves = {-4.5, -3.5, -2.5, -1.5, -0.5, -0.0, 0.5, 1.5, 2.5, 3.5, 4.5};
    EXPECT_EQ(this->round(kernel, kSymmetric4, halves, T(1)), (std::vector<int>{-4, -4, -2, -2, 0, 0, 0, 2, 2, 4, 4}));
    // The same with a zero point, which is added after rounding, so ties do not move.
    EXPECT_EQ(this->round(kernel, kAsymmetric4, halves, T(1), 1),
              (std::vector<int>{-3, -3, -1, -1, 1, 1, 1, 3, 3, 5, 5}));
  });
}

TYPED_TEST(Grid, RoundsToTheNearerNextToATie) {
  using T = TypeParam;
  for_each_instruction_set<T>([&](const auto& kernel) {
    std::vector<T> values;
    std::vector<int> expected;
    for (int below = -127; below < 127; ++below) {
      const T tie = static_cast<T>(below) + T(0.5);
      values.push_back(std::nextafter(tie, T(-1000)));
      expected.push_back(below);
      values.push_back(std::nextafter(tie, T(1000)));
      expected.push_back(below + 1);
    }
    EXPECT_EQ(this->round(kernel, kSymmetric8, values, T(1)), expected);
  });
}

TYPED_TEST(Grid, ClampsToTheCodesOfTheGrid) {
  using T = TypeParam;
  const T inf = std::numeric_limits<T>::infinity();
  const T max = std::numeric_limits<T>::max();
  for_each_instruction_set<T>([&](const auto& kernel) {
    const std::vector<T> values = {-inf, -max, T(-1e9), T(-8), T(-7.5), T(7.5), T(8), T(1e9), max, inf};
    EXPECT_EQ(this->round(kernel, kSymmetric4, values, T(1)), (std::vector<int>{-7, -7, -7, -7, -7, 7, 7, 7, 7, 7}));
    EXPECT_EQ(this->round(kernel, kAsymmetric4, values, T(1)), (std::vector<int>{-8, -8, -8, -8, -8, 7, 7, 7, 7, 7}));
    // Zero points at the ends of the range: levels reach 15 on one side and 0 on the other.
    EXPECT_EQ(this->round(kernel, kAsymmetric4, {T(-1), T(0), T(14.6), T(20)}, T(1), -8),
              (std::vector<int>{-8, -8, 7, 7}));
    EXPECT_EQ(this->round(kernel, kAsymmetric4, {T(-20), T(-14.6), T(0), T(1)}, T(1), 7),
              (std::vector<int>{-8, -8, 7, 7}));
    EXPECT_EQ(this->round(kernel, kAsymmetric8, {T(-300), T(-254.6), T(0), T(300)}, T(1), 127),
              (std::vector<int>{-128, -128, 127, 127}));
  });
}

TYPED_TEST(Grid, TakesNanForTheLowestCode) {
  using T = TypeParam;
  for_each_instruction_set<T>([&](const auto& kernel) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    EXPECT_EQ(this->round(kernel, kSymmetric4, {nan, T(1), nan}, T(1)), (std::vector<int>{-7, 1, -7}));
  });
}

// 3.5 * s / s is a tie and rounds to 4; 3.5 * s * (1 / s) can be below it and round to 3. The loop makes sure that the
// test has cases where the two rules differ.
TYPED_TEST(Grid, DividesByTheScaleRatherThanMultiplyingByItsReciprocal) {
  using T = TypeParam;
  std::vector<T> scales;
  for (int i = 1; i <= 2000 && scales.size() < 20; ++i) {
    const T scale = T(1) / static_cast<T>(i) + T(0.125);
    const T value = T(3.5) * scale;
    if (std::nearbyint(value / scale) != std::nearbyint(value * (T(1) / scale))) {
      scales.push_back(scale);
    }
  }
  ASSERT_EQ(scales.size(), 20U);
  for_each_instruction_set<T>([&](const auto& kernel) {
    for (const T scale : scales) {
      const T value = T(3.5) * scale;
      EXPECT_EQ(this->round(kernel, kSymmetric4, {value}, scale).at(0),
                static_cast<int>(std::nearbyint(value / scale)));
    }
  });
}

TYPED_TEST(Grid, SymmetricScaleIsTheLargestMagnitudeOverTheLargestCode) {
  using T = TypeParam;
  for_each_instruction_set<T>([&](const auto& kernel) {
    EXPECT_EQ(this->grid_of(kernel, kSymmetric4, {T(1), T(-3), T(2)}).scale, T(3) / T(7));
    EXPECT_EQ(this->grid_of(kernel, kSymmetric4, {T(1), T(-3), T(5)}).scale, T(5) / T(7));
    EXPECT_EQ(this->grid_of(kernel, kSymmetric4, {T(-3)}).scale, T(3) / T(7));
    EXPECT_EQ(this->grid_of(kernel, kSymmetric8, {T(1), T(-3), T(2)}).scale, T(3) / T(127));
    EXPECT_EQ(this->grid_of(kernel, {-1, 1, true}, {T(1), T(-3), T(2)}).scale, T(3));
    EXPECT_EQ(this->grid_of(kernel, kSymmetric4, {T(1), T(-3), T(2)}).zero_point, 0);
  });
}

TYPED_TEST(Grid, AsymmetricRangeIsWidenedToHoldZero) {
  using T = TypeParam;
  for_each_instruction_set<T>([&](const auto& kernel) {
    const auto positive = this->grid_of(kernel, kAsymmetric4, {T(3), T(15), T(6)});
    EXPECT_EQ(positive.scale, T(1));
    EXPECT_EQ(positive.zero_point, -8);
    const auto negative = this->grid_of(kernel, kAsymmetric4, {T(-3), T(-15), T(-6)});
    EXPECT_EQ(negative.scale, T(1));
    EXPECT_EQ(negative.zero_point, 7);
    const auto both = this->grid_of(kernel, kAsymmetric4, {T(-5), T(10), T(0)});
    EXPECT_EQ(both.scale, T(1));
    EXPECT_EQ(both.zero_point, -3);
    const auto wide = this->grid_of(kernel, kAsymmetric8, {T(-51), T(204)});
    EXPECT_EQ(wide.scale, T(1));
    EXPECT_EQ(wide.zero_point, -77);
  });
}

TYPED_TEST(Grid, AllZeroGroupsGetScaleOne) {
  using T = TypeParam;
  for_each_instruction_set<T>([&](const auto& kernel) {
    for (const CodeRange& range : {kSymmetric4, kAsymmetric4}) {
      const auto zero = this->grid_of(kernel, range, {T(0), T(-0.0), T(0)});
      EXPECT_EQ(zero.scale, T(1));
      EXPECT_EQ(zero.zero_point, 0);
    }
  });
}

TYPED_TEST(Grid, ScalesOfHugeAndSubnormalGroupsArePositiveAndFinite) {
  using T = TypeParam;
  const T max = std::numeric_limits<T>::max();
  const T tiny = std::numeric_limits<T>::denorm_min();
  for_each_instruction_set<T>([&](const auto& kernel) {
    EXPECT_EQ(this->grid_of(kernel, kSymmetric4, {max, -max}).scale, max / T(7));
    // hi - lo overflows; half of it does not.
    EXPECT_EQ(this->grid_of(kernel, kAsymmetric4, {max, -max / 2}).scale, max * T(0.75) / T(7.5));
    EXPECT_EQ(this->grid_of(kernel, kAsymmetric4, {max, -max / 2}).zero_point, -3);
    EXPECT_EQ(this->grid_of(kernel, kSymmetric4, {T(14) * tiny}).scale, T(2) * tiny);
  });
}

template <typename T>
T at_least_one(T scale, std::int32_t /*levels*/) {
  return scale < T(1) ? T(1) : scale;
}

// The hook is called for every scale except that of an all-zero group, and the zero point is computed from its result.
TYPED_TEST(Grid, ScalesPassThroughTheRoundingOfTheirStorageType) {
  using T = TypeParam;
  for_each_instruction_set<T>([&](const auto& kernel) {
    const GuardedBuffer<T> weight({T(-3), T(0), T(14), T(0.5)});
    GuardedBuffer<T> scales(2);
    GuardedBuffer<std::int8_t> zero_points(2);
    GridView<T> grid{kSymmetric4, 2, 2, scales.data(), zero_points.data(), nullptr, at_least_one<T>};
    kernel.compute_grid(grid, weight.data(), 4, 0, 1);
    EXPECT_EQ(scales.values(), (std::vector<T>{1, 2}));
    grid.range = kAsymmetric4;
    kernel.compute_grid(grid, weight.data(), 4, 0, 1);
    EXPECT_EQ(scales.values(), (std::vector<T>{1, 1}));
    EXPECT_EQ(zero_points.values(), (std::vector<std::int8_t>{-5, -8}));
  });
}

}  // namespace
}  // namespace miniquant::kernels::testing
