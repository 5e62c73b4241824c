// kernels/cholesky.inl: A = L^T L from the last row up, and L^T X = A. Errors are measured componentwise, as in Higham,
// Accuracy and Stability of Numerical Algorithms, theorems 10.3 and 8.5: |A - L^T L| <= (n + 1) eps |L^T| |L|.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "kernels/kernel_testing.h"

namespace miniquant::kernels::testing {
namespace {

template <typename T>
class Cholesky : public ::testing::Test {
 protected:
  /// Y^T Y / m + I / 10 of random Y [m, n], m = n: positive definite, with leading dimension `ld`.
  static std::vector<T> positive_definite(std::mt19937_64& generator, std::int64_t n, std::int64_t ld) {
    const std::vector<double> y = normal<double>(generator, n * n);
    std::vector<T> a(static_cast<std::size_t>((n - 1) * ld + n), T(-99));
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        double sum = i == j ? 0.1 : 0.0;
        for (std::int64_t r = 0; r < n; ++r) {
          sum +=
              y[static_cast<std::size_t>(r * n + i)] * y[static_cast<std::size_t>(r * n + j)] / static_cast<double>(n);
        }
        a[static_cast<std::size_t>(i * ld + j)] = static_cast<T>(sum);
      }
    }
    return a;
  }
};
TYPED_TEST_SUITE(Cholesky, ElementTypes, ElementTypeNames);

TYPED_TEST(Cholesky, FactorTimesItsTransposeIsTheMatrix) {
  using T = TypeParam;
  std::mt19937_64 generator(9);
  for (const std::int64_t n : {1, 2, 3, 7, 33, 128}) {
    const std::int64_t ld = n + 3;
    const std::vector<T> matrix = this->positive_definite(generator, n, ld);
    for_each_instruction_set<T>([&](const auto& kernel) {
      SCOPED_TRACE(::testing::Message() << "n = " << n);
      GuardedBuffer<T> l(matrix);
      ASSERT_EQ(kernel.factor_block(l.data(), ld, n), -1);
      for (std::int64_t i = 0; i < n; ++i) {
        ASSERT_GT(l[i * ld + i], T(0));
        for (std::int64_t j = 0; j < n; ++j) {
          if (j > i) {
            ASSERT_EQ(l[i * ld + j], matrix[static_cast<std::size_t>(i * ld + j)]) << "upper triangle written";
            continue;
          }
          Wide<T> product = 0;
          Wide<T> magnitude = 0;
          for (std::int64_t r = i; r < n; ++r) {  // L[r, i] = 0 for r < i
            const Wide<T> term = static_cast<Wide<T>>(l[r * ld + i]) * l[r * ld + j];
            product += term;
            magnitude += std::abs(term);
          }
          ASSERT_LE(std::abs(product - matrix[static_cast<std::size_t>(i * ld + j)]),
                    static_cast<Wide<T>>(n + 1) * kEps<T> * magnitude)
              << i << ", " << j;
        }
      }
    });
  }
}

TYPED_TEST(Cholesky, NamesTheRowWhosePivotIsNotPositive) {
  using T = TypeParam;
  constexpr std::int64_t kSize = 6;
  for_each_instruction_set<T>([&](const auto& kernel) {
    for (std::int64_t bad = 0; bad < kSize; ++bad) {
      for (const T pivot : {T(0), T(-1), std::numeric_limits<T>::quiet_NaN()}) {
        std::vector<T> identity(kSize * kSize, T(0));
        for (std::int64_t i = 0; i < kSize; ++i) {
          identity[static_cast<std::size_t>(i * kSize + i)] = i == bad ? pivot : T(1);
        }
        GuardedBuffer<T> a(identity);
        EXPECT_EQ(kernel.factor_block(a.data(), kSize, kSize), bad) << pivot;
      }
    }
    // A positive diagonal is not enough: the pivot of row 0 is 1 - 2 * 2.
    GuardedBuffer<T> indefinite(std::vector<T>{1, 2, 2, 1});
    EXPECT_EQ(kernel.factor_block(indefinite.data(), 2, 2), 0);
  });
}

TYPED_TEST(Cholesky, SolvesATileOfColumns) {
  using T = TypeParam;
  std::mt19937_64 generator(10);
  for_each_instruction_set<T>([&](const auto& kernel) {
    // the last strip of four rows has 1, 2, 3 or all of them; 128 is the block of the factorization
    for (const std::int64_t n : {1, 2, 3, 4, 5, 6, 7, 8, 31, 128}) {
      for (const std::int64_t columns : {std::int64_t{1}, kernel.tile_rows, kernel.tile_rows + 5}) {
        SCOPED_TRACE(::testing::Message() << n << " rows, " << columns << " columns");
        const std::int64_t ld = columns + 1;
        GuardedBuffer<T> l(this->positive_definite(generator, n, n));
        ASSERT_EQ(kernel.factor_block(l.data(), n, n), -1);
        GuardedBuffer<T> a(normal<T>(generator, (n - 1) * ld + columns));
        const std::vector<T> before = a.values();
        const std::int64_t tiles = (columns + kernel.tile_rows - 1) / kernel.tile_rows;
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
          GuardedBuffer<T> packed(n * kernel.tile_rows, 64);
          kernel.solve_tile(l.data(), n, n, a.data(), ld, columns, tile, packed.data());
          for (std::int64_t p = 0; p < n; ++p) {
            for (std::int64_t lane = 0; lane < kernel.tile_rows; ++lane) {
              const std::int64_t column = tile * kernel.tile_rows + lane;
              ASSERT_EQ(packed[p * kernel.tile_rows + lane], column < columns ? a[(n - 1 - p) * ld + column] : T(0));
            }
          }
        }
        for (std::int64_t column = 0; column < columns; ++column) {
          for (std::int64_t i = 0; i < n; ++i) {
            Wide<T> sum = 0;
            Wide<T> magnitude = 0;
            for (std::int64_t r = i; r < n; ++r) {
              const Wide<T> term = static_cast<Wide<T>>(l[r * n + i]) * a[r * ld + column];
              sum += term;
              magnitude += std::abs(term);
            }
            ASSERT_LE(std::abs(sum - before[static_cast<std::size_t>(i * ld + column)]),
                      static_cast<Wide<T>>(n + 1) * kEps<T> * magnitude)
                << i << ", " << column;
          }
        }
        for (std::int64_t i = 0; i + 1 < n; ++i) {
          ASSERT_EQ(a[i * ld + columns], before[static_cast<std::size_t>(i * ld + columns)]) << "past the columns";
        }
      }
    }
  });
}

}  // namespace
}  // namespace miniquant::kernels::testing
