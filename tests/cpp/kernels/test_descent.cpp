// kernels/descent-inl.h, on layers rounded to nearest or to random codes.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/kernel_testing.h"
#include "kernels/layer_testing.h"

namespace miniquant::kernels::testing {
namespace {

/// A layer at the start of a descent.
template <typename T>
struct Start {
  Layer<T> layer;
  Quantized<T> quantized;
};

enum class Codes { kNearest, kRandom };

template <typename T>
Start<T> start_of(std::mt19937_64& generator, Layer<T> layer, Codes codes) {
  std::vector<std::int8_t> zero_points(at(layer.rows * layer.groups()), 0);
  Quantized<T> quantized{std::vector<std::int8_t>(at(layer.rows * layer.columns)), std::vector<T>(zero_points.size()),
                         std::vector<T>(at(layer.rows))};
  const GridView<T> grid{kSymmetric4,        layer.group_size,       layer.groups(), quantized.scales.data(),
                         zero_points.data(), quantized.codes.data(), no_rounding<T>};
  const auto& kernel = typed_kernels<T>(kernels_for(InstructionSet::kBaseline));
  kernel.compute_grid(grid, layer.weight.data(), layer.columns, 0, layer.rows);
  kernel.round_to_nearest(grid, layer.weight.data(), layer.columns, 0, layer.rows);
  if (codes == Codes::kRandom) {
    std::uniform_int_distribution<int> code(-7, 7);
    std::generate(quantized.codes.begin(), quantized.codes.end(),
                  [&] { return static_cast<std::int8_t>(code(generator)); });
  }
  for (std::int64_t row = 0; row < layer.rows; ++row) {
    quantized.row_loss[at(row)] = static_cast<T>(loss_of(layer, quantized.codes, quantized.scales, row));
  }
  return {layer, quantized};
}

/// Checks that the gradient is E H of the remaining error: it was computed from the initial one, move by move.
template <typename T>
void expect_gradient(const Layer<T>& layer, const Quantized<T>& before, const Quantized<T>& after,
                     const std::vector<T>& gradient) {
  const std::int64_t padded = SymmetricLayout{layer.columns}.padded_columns();
  for (std::int64_t row = 0; row < layer.rows; ++row) {
    const std::vector<Wide<T>> was = gradient_of(layer, before, row);
    const std::vector<Wide<T>> is = gradient_of(layer, after, row);
    Wide<T> largest = 0;
    for (std::int64_t j = 0; j < layer.columns; ++j) {
      largest = std::max({largest, std::abs(was[at(j)]), std::abs(is[at(j)])});
    }
    for (std::int64_t j = 0; j < layer.columns; ++j) {
      // Up to a few more moves than columns; each adds a rounding error of the size of its terms.
      ASSERT_LE(std::abs(gradient[at(row * padded + j)] - is[at(j)]),
                static_cast<Wide<T>>(4 * layer.columns + 64) * kEps<T> * largest)
          << "row " << row << ", column " << j;
    }
  }
}

template <typename T>
Quantized<T> run(const TypedKernels<T>& kernel, const Start<T>& start, std::int64_t rows_per_call) {
  const Layer<T>& layer = start.layer;
  const GuardedBuffer<T> hessian(symmetric_panels_of(layer));
  GuardedBuffer<T> gradient(padded_gradient_of(layer, start.quantized));
  GuardedBuffer<T> scales(start.quantized.scales);
  GuardedBuffer<std::int8_t> zero_points(std::vector<std::int8_t>(start.quantized.scales.size(), 0));
  GuardedBuffer<std::int8_t> codes(start.quantized.codes);
  GuardedBuffer<T> row_loss(start.quantized.row_loss);
  const RefineProblem<T> problem{
      layer.columns,
      {kSymmetric4, layer.group_size, layer.groups(), scales.data(), zero_points.data(), codes.data(), no_rounding<T>},
      hessian.data(),
      gradient.data(),
      /*rounds=*/1000,
      row_loss.data()};
  for (std::int64_t row = 0; row < layer.rows; row += rows_per_call) {
    const std::int64_t end = std::min(layer.rows, row + rows_per_call);
    GuardedBuffer<T> workspace(kernel.descent_workspace(problem, end - row), 64);
    kernel.descend(problem, row, end, workspace.data());
  }
  EXPECT_EQ(scales.values(), start.quantized.scales);
  const Quantized<T> after{codes.values(), scales.values(), row_loss.values()};
  expect_gradient(layer, start.quantized, after, gradient.values());
  return after;
}

template <typename T>
class Descent : public ::testing::Test {};
TYPED_TEST_SUITE(Descent, ElementTypes, ElementTypeNames);

// One column; a panel of 48 less one, itself and plus one; groups within panels and across them; random codes, which
// move so often that a row's list of moves overflows.
TYPED_TEST(Descent, EndsWhereNoSingleMoveLowersTheLossAndReportsIt) {
  using T = TypeParam;
  struct Case {
    std::int64_t columns;
    std::int64_t group_size;
    Codes codes;
  };
  std::mt19937_64 generator(31);
  for (const Case& c : {Case{1, 1, Codes::kNearest}, Case{47, 5, Codes::kNearest}, Case{48, 48, Codes::kRandom},
                        Case{49, 16, Codes::kRandom}, Case{150, 64, Codes::kNearest}, Case{260, 100, Codes::kRandom}}) {
    SCOPED_TRACE(::testing::Message() << c.columns << " columns, groups of " << c.group_size);
    const Start<T> start = start_of(generator, make_layer<T>(generator, 40, c.columns, c.group_size), c.codes);
    for_each_instruction_set<T>([&](const auto& kernel) {
      const Quantized<T> after = run(kernel, start, start.layer.rows);
      std::int64_t moved = 0;
      for (std::int64_t row = 0; row < start.layer.rows; ++row) {
        const Wide<T> was = loss_of(start.layer, start.quantized.codes, start.quantized.scales, row);
        const Wide<T> is = loss_of(start.layer, after.codes, after.scales, row);
        // The terms subtracted from the initial E H are of its size, and leave their rounding errors.
        const Wide<T> tolerance = static_cast<Wide<T>>(c.columns + 16) * kEps<T> * was;
        ASSERT_LE(is, was + tolerance) << "row " << row;
        ASSERT_LE(std::abs(after.row_loss[at(row)] - is), tolerance) << "row " << row;
        const std::vector<Wide<T>> gradient = gradient_of(start.layer, after, row);
        for (std::int64_t j = 0; j < c.columns; ++j) {
          const int code = after.codes[at(row * c.columns + j)];
          moved += code != start.quantized.codes[at(row * c.columns + j)] ? 1 : 0;
          ASSERT_LE(std::abs(code), 7);
          for (const int step : {-1, 1}) {
            const Wide<T> t =
                step * static_cast<Wide<T>>(after.scales[at(row * start.layer.groups() + j / start.layer.group_size)]);
            const Wide<T> change =
                t * (t * static_cast<Wide<T>>(start.layer.hessian[at(j * c.columns + j)]) - 2 * gradient[at(j)]);
            ASSERT_TRUE(std::abs(code + step) > 7 || change >= -tolerance) << "row " << row << ", column " << j;
          }
        }
      }
      EXPECT_GE(moved, c.columns == 1 ? 0 : start.layer.rows);
    });
  }
}

TYPED_TEST(Descent, ColumnsWithoutInputsStayWhereTheyAre) {
  using T = TypeParam;
  std::mt19937_64 generator(32);
  constexpr std::int64_t kColumns = 60;
  constexpr std::int64_t kDead = 7;
  Layer<T> layer = make_layer<T>(generator, 10, kColumns, 16);
  for (std::int64_t i = 0; i < kColumns; ++i) {
    layer.hessian[at(i * kColumns + kDead)] = layer.hessian[at(kDead * kColumns + i)] = T(0);
  }
  const Start<T> start = start_of(generator, layer, Codes::kRandom);
  for_each_instruction_set<T>([&](const auto& kernel) {
    const Quantized<T> after = run(kernel, start, layer.rows);
    EXPECT_NE(after.codes, start.quantized.codes);
    for (std::int64_t row = 0; row < layer.rows; ++row) {
      EXPECT_EQ(after.codes[at(row * kColumns + kDead)], start.quantized.codes[at(row * kColumns + kDead)]);
    }
  });
}

TYPED_TEST(Descent, RowsPerCallDoNotChangeABit) {
  using T = TypeParam;
  std::mt19937_64 generator(33);
  const Start<T> start = start_of(generator, make_layer<T>(generator, 60, 200, 37), Codes::kRandom);
  for_each_instruction_set<T>([&](const auto& kernel) {
    const Quantized<T> whole = run(kernel, start, start.layer.rows);
    for (const std::int64_t rows_per_call : {std::int64_t{1}, std::int64_t{7}}) {
      const Quantized<T> parts = run(kernel, start, rows_per_call);
      EXPECT_EQ(parts.codes, whole.codes);
      EXPECT_EQ(parts.row_loss, whole.row_loss);
    }
  });
}

TYPED_TEST(Descent, FusedInstructionSetsGiveTheSameBits) {
  using T = TypeParam;
  const std::vector<InstructionSet> fused = fused_instruction_sets();
  if (fused.size() < 2) {
    GTEST_SKIP() << kNeedsTwoFused;
  }
  std::mt19937_64 generator(33);
  const Start<T> start = start_of(generator, make_layer<T>(generator, 60, 200, 37), Codes::kRandom);
  const Quantized<T> first = run(typed_kernels<T>(kernels_for(fused.front())), start, start.layer.rows);
  for (const InstructionSet instruction_set : fused) {
    const Quantized<T> result = run(typed_kernels<T>(kernels_for(instruction_set)), start, start.layer.rows);
    EXPECT_EQ(result.codes, first.codes) << name(instruction_set);
    EXPECT_EQ(result.row_loss, first.row_loss) << name(instruction_set);
  }
}

}  // namespace
}  // namespace miniquant::kernels::testing
