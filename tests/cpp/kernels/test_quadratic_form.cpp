// kernels/quadratic_form-inl.h: e H e^T per row.

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
class QuadraticForm : public ::testing::Test {
 protected:
  static std::vector<T> forms(const TypedKernels<T>& kernel, const std::vector<T>& error, const std::vector<T>& upper,
                              std::int64_t rows, std::int64_t columns, std::int64_t rows_per_call) {
    const GuardedBuffer<T> errors(error);
    const GuardedBuffer<T> triangle(panels_of<T>(
        columns, [&](std::int64_t j, std::int64_t i) { return upper[static_cast<std::size_t>(i * columns + j)]; },
        std::numeric_limits<T>::quiet_NaN()));
    GuardedBuffer<T> form(rows);
    const QuadraticFormProblem<T> problem{{columns}, errors.data(), triangle.data(), form.data()};
    GuardedBuffer<T> workspace(kernel.quadratic_form_workspace(problem), 64);
    for (std::int64_t row = 0; row < rows; row += rows_per_call) {
      kernel.quadratic_form(problem, row, std::min(rows, row + rows_per_call), workspace.data());
    }
    return form.values();
  }
};
TYPED_TEST_SUITE(QuadraticForm, ElementTypes, ElementTypeNames);

// A sum of K^2 terms in nested sums of at most K terms each: 2 (K + 3) eps times the sum of magnitudes.
TYPED_TEST(QuadraticForm, IsTheSumOverTheWholeMatrix) {
  using T = TypeParam;
  std::mt19937_64 generator(7);
  for_each_instruction_set<T>([&](const auto& kernel) {
    // one row, a tile less one, a tile plus one; one column, partly filled strips, more than one panel of the triangle
    for (const std::int64_t rows : {std::int64_t{1}, kernel.tile_rows - 1, kernel.tile_rows + 1}) {
      for (const std::int64_t columns : {1, 3, 4, 5, 48, 49, 130}) {
        SCOPED_TRACE(::testing::Message() << rows << " x " << columns);
        const std::vector<T> error = normal<T>(generator, rows * columns);
        const std::vector<T> upper = normal<T>(generator, columns * columns);
        const std::vector<T> got = this->forms(kernel, error, upper, rows, columns, rows);
        for (std::int64_t row = 0; row < rows; ++row) {
          Wide<T> expected = 0;
          Wide<T> magnitude = 0;
          for (std::int64_t i = 0; i < columns; ++i) {
            for (std::int64_t j = 0; j < columns; ++j) {
              const Wide<T> h = upper[static_cast<std::size_t>(std::min(i, j) * columns + std::max(i, j))];
              const Wide<T> term = static_cast<Wide<T>>(error[static_cast<std::size_t>(row * columns + i)]) * h *
                                   error[static_cast<std::size_t>(row * columns + j)];
              expected += term;
              magnitude += std::abs(term);
            }
          }
          ASSERT_LE(std::abs(got[static_cast<std::size_t>(row)] - expected),
                    static_cast<Wide<T>>(2 * (columns + 3)) * kEps<T> * magnitude)
              << "row " << row;
        }
      }
    }
  });
}

TYPED_TEST(QuadraticForm, RowsPerCallDoNotChangeABit) {
  using T = TypeParam;
  constexpr std::int64_t kColumns = 67;
  std::mt19937_64 generator(8);
  for_each_instruction_set<T>([&](const auto& kernel) {
    const std::int64_t rows = 2 * kernel.tile_rows + 1;
    const std::vector<T> error = normal<T>(generator, rows * kColumns);
    const std::vector<T> upper = normal<T>(generator, kColumns * kColumns);
    const std::vector<T> whole = this->forms(kernel, error, upper, rows, kColumns, rows);
    for (const std::int64_t rows_per_call : {std::int64_t{1}, std::int64_t{7}, kernel.tile_rows}) {
      EXPECT_EQ(this->forms(kernel, error, upper, rows, kColumns, rows_per_call), whole) << rows_per_call;
    }
  });
}

}  // namespace
}  // namespace miniquant::kernels::testing
