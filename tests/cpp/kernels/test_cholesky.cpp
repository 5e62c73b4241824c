// kernels/cholesky-inl.h: A = L^T L from the last row up, and L^T X = A. Errors are measured componentwise, as in
// Higham, Accuracy and Stability of Numerical Algorithms, theorems 10.3 and 8.5: |A - L^T L| <= (n + 1) eps |L^T| |L|.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "kernels/kernel_testing.h"

namespace miniquant::kernels::testing {
namespace {

/// Blocks of a triangle are [rows][kWidth].
constexpr std::int64_t kWidth = kPanelColumns;

// one row; strips of four and eight rows less one, filled and plus one; a whole block
constexpr std::int64_t kOrders[] = {1, 2, 3, 4, 5, 7, 8, 9, 31, 47, 48};

template <typename T>
class Cholesky : public ::testing::Test {
 protected:
  /// Y^T Y / n + I / 10 of random Y [n, n]: positive definite, as a block; -99 past its columns.
  static std::vector<T> positive_definite(std::mt19937_64& generator, std::int64_t n) {
    const std::vector<double> y = normal<double>(generator, n * n);
    std::vector<T> a(static_cast<std::size_t>(n * kWidth), T(-99));
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        double sum = i == j ? 0.1 : 0.0;
        for (std::int64_t r = 0; r < n; ++r) {
          sum +=
              y[static_cast<std::size_t>(r * n + i)] * y[static_cast<std::size_t>(r * n + j)] / static_cast<double>(n);
        }
        a[static_cast<std::size_t>(i * kWidth + j)] = static_cast<T>(sum);
      }
    }
    return a;
  }
};
TYPED_TEST_SUITE(Cholesky, ElementTypes, ElementTypeNames);

// The error of a sum of `count` products that is then subtracted: (count + 2) eps times the sum of magnitudes.
TYPED_TEST(Cholesky, SubtractsTheProductsOfTwoBlocks) {
  using T = TypeParam;
  std::mt19937_64 generator(8);
  for_each_instruction_set<T>([&](const auto& kernel) {
    for (const std::int64_t rows : kOrders) {
      for (const std::int64_t count : {std::int64_t{1}, std::int64_t{5}, kernel.terms_per_product}) {
        const GuardedBuffer<T> left(normal<T>(generator, count * kWidth));
        const GuardedBuffer<T> right(normal<T>(generator, count * kWidth));
        GuardedBuffer<T> block(normal<T>(generator, rows * kWidth));
        const std::vector<T> before = block.values();
        kernel.subtract_products(left.data(), right.data(), count, rows, block.data(), {});
        for (std::int64_t j = 0; j < rows; ++j) {
          for (std::int64_t i = 0; i < kWidth; ++i) {
            Wide<T> expected = before[static_cast<std::size_t>(j * kWidth + i)];
            Wide<T> magnitude = std::abs(expected);
            for (std::int64_t k = 0; k < count; ++k) {
              const Wide<T> product = static_cast<Wide<T>>(left[k * kWidth + j]) * right[k * kWidth + i];
              expected -= product;
              magnitude += std::abs(product);
            }
            ASSERT_LE(std::abs(block[j * kWidth + i] - expected), static_cast<Wide<T>>(count + 2) * kEps<T> * magnitude)
                << rows << " rows, " << count << " terms: " << j << ", " << i;
          }
        }
      }
    }
  });
}

TYPED_TEST(Cholesky, FactorTimesItsTransposeIsTheMatrix) {
  using T = TypeParam;
  std::mt19937_64 generator(9);
  for (const std::int64_t n : kOrders) {
    const std::vector<T> matrix = this->positive_definite(generator, n);
    for_each_instruction_set<T>([&](const auto& kernel) {
      SCOPED_TRACE(::testing::Message() << "n = " << n);
      GuardedBuffer<T> l(matrix);
      ASSERT_EQ(kernel.factor_block(l.data(), n), -1);
      for (std::int64_t i = 0; i < n; ++i) {
        ASSERT_GT(l[i * kWidth + i], T(0));
        for (std::int64_t j = 0; j <= i; ++j) {
          Wide<T> product = 0;
          Wide<T> magnitude = 0;
          for (std::int64_t r = i; r < n; ++r) {  // L[r, i] = 0 for r < i
            const Wide<T> term = static_cast<Wide<T>>(l[r * kWidth + i]) * l[r * kWidth + j];
            product += term;
            magnitude += std::abs(term);
          }
          ASSERT_LE(std::abs(product - matrix[static_cast<std::size_t>(i * kWidth + j)]),
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
        std::vector<T> identity(kSize * kWidth, T(0));
        for (std::int64_t i = 0; i < kSize; ++i) {
          identity[static_cast<std::size_t>(i * kWidth + i)] = i == bad ? pivot : T(1);
        }
        GuardedBuffer<T> a(identity);
        EXPECT_EQ(kernel.factor_block(a.data(), kSize), bad) << pivot;
      }
    }
    // A positive diagonal is not enough: the pivot of row 0 is 1 - 2 * 2.
    GuardedBuffer<T> indefinite(2 * kWidth);
    indefinite[0] = 1;
    indefinite[kWidth] = 2;
    indefinite[kWidth + 1] = 1;
    EXPECT_EQ(kernel.factor_block(indefinite.data(), 2), 0);
  });
}

TYPED_TEST(Cholesky, SolvesABlock) {
  using T = TypeParam;
  std::mt19937_64 generator(10);
  for_each_instruction_set<T>([&](const auto& kernel) {
    for (const std::int64_t n : kOrders) {
      GuardedBuffer<T> l(this->positive_definite(generator, n));
      ASSERT_EQ(kernel.factor_block(l.data(), n), -1);
      GuardedBuffer<T> x(normal<T>(generator, n * kWidth));
      const std::vector<T> before = x.values();
      kernel.solve_block(l.data(), n, x.data());
      for (std::int64_t column = 0; column < kWidth; ++column) {
        for (std::int64_t i = 0; i < n; ++i) {
          Wide<T> sum = 0;
          Wide<T> magnitude = 0;
          for (std::int64_t r = i; r < n; ++r) {
            const Wide<T> term = static_cast<Wide<T>>(l[r * kWidth + i]) * x[r * kWidth + column];
            sum += term;
            magnitude += std::abs(term);
          }
          ASSERT_LE(std::abs(sum - before[static_cast<std::size_t>(i * kWidth + column)]),
                    static_cast<Wide<T>>(n + 1) * kEps<T> * magnitude)
              << n << " rows: " << i << ", " << column;
        }
      }
    }
  });
}

// Terms are added in the same order with the same operations, whatever the length of the vectors.
TYPED_TEST(Cholesky, FusedInstructionSetsGiveTheSameBits) {
  using T = TypeParam;
  const std::vector<InstructionSet> fused = fused_instruction_sets();
  if (fused.size() < 2) {
    GTEST_SKIP() << kNeedsTwoFused;
  }
  std::mt19937_64 generator(11);
  const std::vector<T> matrix = this->positive_definite(generator, 45);
  const std::vector<T> rest = normal<T>(generator, 45 * kWidth);
  std::vector<std::vector<T>> results;
  for (const InstructionSet instruction_set : fused) {
    const auto& kernel = typed_kernels<T>(kernels_for(instruction_set));
    GuardedBuffer<T> l(matrix);
    GuardedBuffer<T> x(rest);
    kernel.subtract_products(rest.data(), rest.data(), 45, 45, x.data(), {});
    ASSERT_EQ(kernel.factor_block(l.data(), 45), -1);
    kernel.solve_block(l.data(), 45, x.data());
    results.push_back(x.values());
  }
  for (const std::vector<T>& result : results) {
    EXPECT_EQ(result, results.front());
  }
}

}  // namespace
}  // namespace miniquant::kernels::testing
