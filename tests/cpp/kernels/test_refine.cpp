// kernels/refine-inl.h and kernels/scale_search-inl.h. Tests what the operators' tests do not: memory past the ends of
// arrays, and instruction sets other than the chosen one.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "kernels/kernel_testing.h"
#include "kernels/layer_testing.h"

namespace miniquant::kernels::testing {
namespace {

constexpr CodeRange kFullRange4 = {-8, 7, true};

/// Searches scales, rounds to nearest, and refines for `rounds` rounds.
template <typename T>
Quantized<T> run(const TypedKernels<T>& kernel, const Layer<T>& layer, std::int64_t rounds,
                 std::int64_t rows_per_call) {
  const GuardedBuffer<T> weight(layer.weight);
  const GuardedBuffer<T> hessian(symmetric_panels_of(layer));
  const GuardedBuffer<T> factors(std::vector<T>{1, T(0.75), T(0.875), -1, T(-0.75), T(-0.875)});
  const GuardedBuffer<T> importance(std::vector<T>(at(layer.columns), T(1)));
  GuardedBuffer<T> scales(layer.rows * layer.groups());
  GuardedBuffer<std::int8_t> zero_points(std::vector<std::int8_t>(at(layer.rows * layer.groups()), 0));
  GuardedBuffer<std::int8_t> codes(layer.rows * layer.columns);
  const GridView<T> grid{kFullRange4,        layer.group_size, layer.groups(), scales.data(),
                         zero_points.data(), codes.data(),     no_rounding<T>};
  const ScaleSearch<T> search{factors.data(), 6, importance.data()};
  kernel.search_grid(grid, search, weight.data(), layer.columns, 0, layer.rows);
  kernel.round_to_nearest(grid, weight.data(), layer.columns, 0, layer.rows);
  GuardedBuffer<T> row_loss(layer.rows);
  for (std::int64_t row = 0; row < layer.rows; ++row) {
    row_loss[row] = static_cast<T>(loss_of(layer, codes.values(), scales.values(), row));
  }
  GuardedBuffer<T> gradient(padded_gradient_of<T>(layer, {codes.values(), scales.values(), {}}));
  const RefineProblem<T> problem{layer.columns, grid, hessian.data(), gradient.data(), rounds, row_loss.data()};
  for (std::int64_t row = 0; row < layer.rows; row += rows_per_call) {
    const std::int64_t end = std::min(layer.rows, row + rows_per_call);
    GuardedBuffer<T> workspace(kernel.refine_workspace(problem, end - row), 64);
    kernel.refine(problem, row, end, workspace.data());
  }
  return {codes.values(), scales.values(), row_loss.values()};
}

template <typename T>
class Refine : public ::testing::Test {};
TYPED_TEST_SUITE(Refine, ElementTypes, ElementTypeNames);

TYPED_TEST(Refine, NeverRaisesTheLossOfARowAndReportsIt) {
  using T = TypeParam;
  struct Case {
    std::int64_t columns;
    std::int64_t group_size;
  };
  std::mt19937_64 generator(21);
  // one column; partly filled strips and groups; groups that cross panels; one group of all columns
  for (const Case& c : {Case{1, 1}, Case{9, 4}, Case{65, 7}, Case{100, 64}, Case{110, 200}}) {
    const Layer<T> layer = make_layer<T>(generator, 2 * 48 + 1, c.columns, std::min(c.group_size, c.columns));
    for_each_instruction_set<T>([&](const auto& kernel) {
      SCOPED_TRACE(::testing::Message() << c.columns << " columns, groups of " << c.group_size);
      Quantized<T> before = run(kernel, layer, 0, layer.rows);
      for (const std::int64_t rounds : {1, 3}) {
        const Quantized<T> after = run(kernel, layer, rounds, layer.rows);
        for (std::int64_t row = 0; row < layer.rows; ++row) {
          const Wide<T> was = loss_of(layer, before.codes, before.scales, row);
          const Wide<T> is = loss_of(layer, after.codes, after.scales, row);
          // The sums that decide a move have up to K terms.
          const Wide<T> tolerance = static_cast<Wide<T>>(4 * (c.columns + 4)) * kEps<T> * (was + 1);
          ASSERT_LE(is, was + tolerance) << "row " << row;
          ASSERT_LE(std::abs(after.row_loss[at(row)] - is), tolerance) << "row " << row;
        }
        before = after;
      }
    });
  }
}

TYPED_TEST(Refine, RowsPerCallDoNotChangeABit) {
  using T = TypeParam;
  std::mt19937_64 generator(22);
  const Layer<T> layer = make_layer<T>(generator, 250, 61, 16);
  for_each_instruction_set<T>([&](const auto& kernel) {
    const Quantized<T> whole = run(kernel, layer, 2, layer.rows);
    for (const std::int64_t rows_per_call : {std::int64_t{1}, kernel.tile_rows}) {
      const Quantized<T> parts = run(kernel, layer, 2, rows_per_call);
      EXPECT_EQ(parts.codes, whole.codes);
      EXPECT_EQ(parts.scales, whole.scales);
      EXPECT_EQ(parts.row_loss, whole.row_loss);
    }
  });
}

TYPED_TEST(Refine, FusedInstructionSetsGiveTheSameBits) {
  using T = TypeParam;
  const std::vector<InstructionSet> fused = fused_instruction_sets();
  if (fused.size() < 2) {
    GTEST_SKIP() << kNeedsTwoFused;
  }
  std::mt19937_64 generator(24);
  for (const std::int64_t group_size : {64, 37, 6}) {
    const Layer<T> layer = make_layer<T>(generator, 100, 150, group_size);
    const Quantized<T> first = run(typed_kernels<T>(kernels_for(fused.front())), layer, 3, layer.rows);
    for (const InstructionSet instruction_set : fused) {
      const Quantized<T> result = run(typed_kernels<T>(kernels_for(instruction_set)), layer, 3, layer.rows);
      EXPECT_EQ(result.codes, first.codes) << name(instruction_set) << ", groups of " << group_size;
      EXPECT_EQ(result.scales, first.scales) << name(instruction_set) << ", groups of " << group_size;
      EXPECT_EQ(result.row_loss, first.row_loss) << name(instruction_set) << ", groups of " << group_size;
    }
  }
}

TYPED_TEST(Refine, EveryInstructionSetFindsTheSameScales) {
  using T = TypeParam;
  std::mt19937_64 generator(23);
  const Layer<T> layer = make_layer<T>(generator, 30, 100, 37);
  const Quantized<T> baseline = run(typed_kernels<T>(kernels_for(InstructionSet::kBaseline)), layer, 0, layer.rows);
  for_each_instruction_set<T>([&](const auto& kernel) {
    const Quantized<T> other = run(kernel, layer, 0, layer.rows);
    EXPECT_EQ(other.scales, baseline.scales);
    EXPECT_EQ(other.codes, baseline.codes);
  });
}

}  // namespace
}  // namespace miniquant::kernels::testing
