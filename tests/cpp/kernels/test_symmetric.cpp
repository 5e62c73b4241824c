// kernels/symmetric-inl.h: passes over H and H^T.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels/kernel_testing.h"

namespace miniquant::kernels::testing {
namespace {

template <typename T>
class SymmetricPasses : public ::testing::Test {};
TYPED_TEST_SUITE(SymmetricPasses, ElementTypes, ElementTypeNames);

// a block of a transposition less one, itself and plus one; a panel less one, itself and plus one; three panels, the
// last partly filled
constexpr std::int64_t kSizes[] = {1, 3, 4, 5, 47, 48, 49, 101};

TYPED_TEST(SymmetricPasses, TransposesWhatIsAskedForAndNoMore) {
  using T = TypeParam;
  std::mt19937_64 generator(1);
  for_each_instruction_set<T>([&](const auto& kernel) {
    for (const std::int64_t rows : {0, 1, 3, 4, 7, 48}) {
      for (const std::int64_t width : {0, 1, 2, 5, 8, 48}) {
        const std::int64_t ld = width + 3;
        const std::int64_t to_ld = rows + 2;
        const GuardedBuffer<T> from(normal<T>(generator, std::max<std::int64_t>(0, (rows - 1) * ld + width)));
        const std::vector<T> before(static_cast<std::size_t>(std::max<std::int64_t>(0, (width - 1) * to_ld + rows)),
                                    T(7));
        GuardedBuffer<T> to(before);
        kernel.transpose(from.data(), ld, rows, width, to.data(), to_ld);
        for (std::int64_t at = 0; at < static_cast<std::int64_t>(before.size()); ++at) {
          const std::int64_t i = at % to_ld;
          ASSERT_EQ(to[at], i < rows ? from[i * ld + at / to_ld] : T(7)) << rows << " x " << width << " at " << at;
        }
      }
    }
  });
}

/// Compares the squares of the average of `h` [columns, columns] with products and sums that are rounded to To.
template <typename To, typename T, typename Average>
void expect_averages(const GuardedBuffer<T>& h, std::int64_t columns, double factor, const Average& average) {
  using Wide = std::common_type_t<T, To>;
  const auto scaled = [&](std::int64_t i, std::int64_t j) {
    return static_cast<To>(static_cast<Wide>(h[i * columns + j]) * static_cast<Wide>(factor));
  };
  for (std::int64_t i_begin = 0; i_begin < columns; i_begin += kPanelColumns) {
    for (std::int64_t j_begin = 0; j_begin <= i_begin; j_begin += kPanelColumns) {
      const std::int64_t rows = std::min(kPanelColumns, columns - i_begin);
      GuardedBuffer<To> square(rows * kPanelColumns);
      average(h.data(), columns, i_begin, j_begin, factor, square.data());
      for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = 0; j < kPanelColumns; ++j) {
          const bool inside = j_begin + j < columns;
          const To expected =
              inside ? (scaled(i_begin + i, j_begin + j) + scaled(j_begin + j, i_begin + i)) / 2 : To(0);
          ASSERT_EQ(square[i * kPanelColumns + j], expected) << columns << " at " << i_begin + i << ", " << j_begin + j;
        }
      }
    }
  }
}

TYPED_TEST(SymmetricPasses, AveragesSquaresInBothTypes) {
  using T = TypeParam;
  std::mt19937_64 generator(2);
  for_each_instruction_set<T>([&](const auto& kernel) {
    for (const std::int64_t columns : kSizes) {
      const GuardedBuffer<T> h(normal<T>(generator, columns * columns));
      expect_averages<float>(h, columns, 0.25, kernel.average_square_as_f32);
      expect_averages<double>(h, columns, 0.25, kernel.average_square_as_f64);
    }
  });
}

// A float64 entry that fits float32 only after the multiplication, and a product that fits float64 only.
TYPED_TEST(SymmetricPasses, MultipliesInTheWiderType) {
  using T = TypeParam;
  for_each_instruction_set<T>([&](const auto& kernel) {
    const T large = std::ldexp(T(1), std::is_same_v<T, float> ? 100 : 200);
    const GuardedBuffer<T> h(std::vector<T>{large});
    float narrow[kPanelColumns];
    kernel.average_square_as_f32(h.data(), 1, 0, 0, 1.0 / static_cast<double>(large), narrow);
    EXPECT_EQ(narrow[0], 1.0F);
    double wide[kPanelColumns];
    kernel.average_square_as_f64(h.data(), 1, 0, 0, 0x1p100, wide);
    EXPECT_EQ(wide[0], static_cast<double>(large) * 0x1p100);
  });
}

TYPED_TEST(SymmetricPasses, SurveysEveryPairOnce) {
  using T = TypeParam;
  std::mt19937_64 generator(3);
  for_each_instruction_set<T>([&](const auto& kernel) {
    for (const std::int64_t columns : kSizes) {
      const std::vector<T> values = normal<T>(generator, columns * columns);
      for (std::int64_t row_begin = 0; row_begin < columns; row_begin += kPanelColumns) {
        const std::int64_t row_end = std::min(columns, row_begin + kPanelColumns);
        T largest = 0;
        T asymmetry = 0;
        for (std::int64_t i = row_begin; i < row_end; ++i) {
          for (std::int64_t j = 0; j < row_end; ++j) {
            const T lower = values[static_cast<std::size_t>(i * columns + j)];
            const T upper = values[static_cast<std::size_t>(j * columns + i)];
            largest = std::max({largest, std::abs(lower), std::abs(upper)});
            asymmetry = std::max(asymmetry, std::abs(lower - upper));
          }
        }
        const GuardedBuffer<T> h(values);
        const SymmetryFigures<T> figures = kernel.survey_symmetry(h.data(), columns, row_begin);
        EXPECT_TRUE(figures.finite);
        EXPECT_EQ(figures.largest, largest) << columns << " from row " << row_begin;
        EXPECT_EQ(figures.largest_asymmetry, asymmetry) << columns << " from row " << row_begin;
        for (const T bad : {std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN()}) {
          for (const std::int64_t at : {row_begin * columns, row_begin, (row_end - 1) * columns + row_end - 1}) {
            GuardedBuffer<T> damaged(values);
            damaged[at] = bad;
            EXPECT_FALSE(kernel.survey_symmetry(damaged.data(), columns, row_begin).finite) << bad << " at " << at;
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace miniquant::kernels::testing
