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
  // one column; partly filled strips and groups; groups that cross panels; one group of all columns; a strip that
  // begins with the last column of a whole panel
  for (const Case& c : {Case{1, 1}, Case{9, 4}, Case{65, 7}, Case{100, 64}, Case{110, 200}, Case{96, 5}}) {
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

constexpr CodeRange kAsymmetric3 = {-4, 3, false};

/// A layer on a two-level grid: its multiples, and the loss that the kernel reports.
template <typename T>
struct Stepped {
  std::vector<std::int8_t> codes;
  std::vector<T> scales;
  std::vector<T> minima;
  std::vector<T> row_loss;
};

/// Steps that do not suit the weights, minima of 0, codes rounded to nearest; then `rounds` rounds of refinement.
template <typename T>
Stepped<T> run_with_steps(const TypedKernels<T>& kernel, const Layer<T>& layer, bool with_minima, std::int64_t rounds) {
  const std::int64_t count = layer.rows * layer.groups();
  const T minimum = with_minima ? T(1.5) : T(0);
  std::vector<T> shifted = layer.weight;
  for (T& value : shifted) {
    value += minimum;
  }
  const GuardedBuffer<T> weight(shifted);
  const GuardedBuffer<T> hessian(symmetric_panels_of(layer));
  const GuardedBuffer<T> scale_steps(std::vector<T>(at(count), T(0.0625)));
  const GuardedBuffer<T> minimum_steps(std::vector<T>(at(count), T(0.125)));
  GuardedBuffer<T> scales(std::vector<T>(at(count), T(0.5)));
  GuardedBuffer<T> minima(std::vector<T>(at(count), minimum));
  GuardedBuffer<std::int8_t> zero_points(
      std::vector<std::int8_t>(at(count), static_cast<std::int8_t>(with_minima ? kAsymmetric3.code_min : 0)));
  GuardedBuffer<std::int8_t> codes(layer.rows * layer.columns);
  const StepsView<T> steps{scale_steps.data(), with_minima ? minimum_steps.data() : nullptr,
                           with_minima ? minima.data() : nullptr, with_minima ? 1 : -15, 15};
  const GridView<T> grid{.range = with_minima ? kAsymmetric3 : kFullRange4,
                         .group_size = layer.group_size,
                         .groups = layer.groups(),
                         .scales = scales.data(),
                         .zero_points = zero_points.data(),
                         .codes = codes.data(),
                         .round_scale = no_rounding<T>,
                         .steps = steps};
  kernel.round_to_nearest(grid, weight.data(), layer.columns, 0, layer.rows);
  const auto levels = [&] {
    std::vector<std::int8_t> of = codes.values();
    for (std::int8_t& code : of) {
      code = static_cast<std::int8_t>(code - zero_points[0]);
    }
    return of;
  };
  // The oracle's layer is the one with the minima added.
  const auto with_its_minima = [&] {
    Layer<T> other = layer;
    for (std::int64_t i = 0; i < layer.rows * layer.columns; ++i) {
      other.weight[at(i)] += minima[i / layer.columns * layer.groups() + i % layer.columns / layer.group_size];
    }
    return other;
  };
  GuardedBuffer<T> row_loss(layer.rows);
  for (std::int64_t row = 0; row < layer.rows; ++row) {
    row_loss[row] = static_cast<T>(loss_of(with_its_minima(), levels(), scales.values(), row));
  }
  GuardedBuffer<T> gradient(padded_gradient_of<T>(with_its_minima(), {levels(), scales.values(), {}}));
  const RefineProblem<T> problem{layer.columns, grid, hessian.data(), gradient.data(), rounds, row_loss.data()};
  GuardedBuffer<T> workspace(kernel.refine_workspace(problem, layer.rows), 64);
  kernel.refine(problem, 0, layer.rows, workspace.data());
  const Layer<T> last = with_its_minima();
  for (std::int64_t row = 0; row < layer.rows; ++row) {
    const Wide<T> is = loss_of(last, levels(), scales.values(), row);
    const Wide<T> tolerance = static_cast<Wide<T>>(64 * (layer.columns + 4)) * kEps<T> * (is + 1);
    EXPECT_LE(std::abs(row_loss[row] - is), tolerance) << "row " << row;
  }
  return {codes.values(), scales.values(), minima.values(), row_loss.values()};
}

TYPED_TEST(Refine, MovesScalesAndMinimaInWholeStepsOnly) {
  using T = TypeParam;
  std::mt19937_64 generator(25);
  for (const std::int64_t group_size : {1, 16, 32, 64}) {
    const Layer<T> layer = make_layer<T>(generator, 2 * 48 + 1, 96, group_size);
    for (const bool with_minima : {false, true}) {
      for_each_instruction_set<T>([&](const auto& kernel) {
        SCOPED_TRACE(::testing::Message() << "groups of " << group_size << (with_minima ? " with minima" : ""));
        Stepped<T> before = run_with_steps(kernel, layer, with_minima, 0);
        const Stepped<T> start = before;
        for (const std::int64_t rounds : {1, 2, 5}) {
          const Stepped<T> after = run_with_steps(kernel, layer, with_minima, rounds);
          for (std::int64_t row = 0; row < layer.rows; ++row) {
            ASSERT_LE(after.row_loss[at(row)], before.row_loss[at(row)]) << "row " << row;
          }
          before = after;
        }
        std::int64_t moved = 0;
        for (std::size_t i = 0; i < before.scales.size(); ++i) {
          const T multiple = before.scales[i] / T(0.0625);
          const T minimum = before.minima[i] / T(0.125);
          ASSERT_EQ(multiple, std::nearbyint(multiple));
          ASSERT_EQ(minimum, std::nearbyint(minimum));
          ASSERT_TRUE(multiple >= 1 && multiple <= 15) << multiple;
          ASSERT_TRUE(minimum >= 0 && minimum <= 15) << minimum;
          moved += before.scales[i] != start.scales[i] || before.minima[i] != start.minima[i] ? 1 : 0;
        }
        EXPECT_GT(moved, 0);
      });
    }
  }
}

TYPED_TEST(Refine, FusedInstructionSetsMoveTheSameSteps) {
  using T = TypeParam;
  const std::vector<InstructionSet> fused = fused_instruction_sets();
  if (fused.size() < 2) {
    GTEST_SKIP() << kNeedsTwoFused;
  }
  std::mt19937_64 generator(26);
  const Layer<T> layer = make_layer<T>(generator, 100, 96, 32);
  for (const bool with_minima : {false, true}) {
    const Stepped<T> first = run_with_steps(typed_kernels<T>(kernels_for(fused.front())), layer, with_minima, 3);
    for (const InstructionSet instruction_set : fused) {
      const Stepped<T> other = run_with_steps(typed_kernels<T>(kernels_for(instruction_set)), layer, with_minima, 3);
      EXPECT_EQ(other.codes, first.codes) << name(instruction_set);
      EXPECT_EQ(other.scales, first.scales) << name(instruction_set);
      EXPECT_EQ(other.minima, first.minima) << name(instruction_set);
      EXPECT_EQ(other.row_loss, first.row_loss) << name(instruction_set);
    }
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
