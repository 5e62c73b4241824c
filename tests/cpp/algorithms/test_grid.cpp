#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "algorithms/grid.h"
#include "algorithms/rtn.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

Grid computed_grid(const at::Tensor& weight, int64_t bits, int64_t group_size, bool symmetric) {
  Grid grid = make_grid(weight, {{.bits = bits, .group_size = group_size, .symmetric = symmetric}});
  compute_scales(grid, weight.to(compute_dtype(weight.scalar_type())).contiguous(), ScaleMethod::kAbsmax);
  return grid;
}

TEST(Grid, ComputesInFloat64ForFloat64AndInFloat32ForTheRest) {
  EXPECT_EQ(compute_dtype(at::kDouble), at::kDouble);
  for (const at::ScalarType dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    EXPECT_EQ(compute_dtype(dtype), at::kFloat);
  }
}

TEST(Grid, CodesOfEveryNumberOfBits) {
  for (int64_t bits = 2; bits <= 8; ++bits) {
    const auto half = static_cast<int32_t>(std::exp2(bits - 1));
    const kernels::CodeRange symmetric = code_range(bits, true, false);
    EXPECT_EQ(symmetric.code_min, -(half - 1));
    EXPECT_EQ(symmetric.code_max, half - 1);
    EXPECT_TRUE(symmetric.symmetric);
    const kernels::CodeRange asymmetric = code_range(bits, false, false);
    EXPECT_EQ(asymmetric.code_min, -half);
    EXPECT_EQ(asymmetric.code_max, half - 1);
    EXPECT_FALSE(asymmetric.symmetric);
  }
}

TEST(Grid, GroupsOfARow) {
  struct Case {
    int64_t group_size, columns, columns_per_group, groups;
  };
  for (const Case& c :
       {Case{64, 768, 64, 12}, Case{64, 769, 64, 13}, Case{64, 63, 63, 1}, Case{64, 64, 64, 1}, Case{-1, 768, 768, 1},
        Case{1, 5, 1, 5}, Case{5, 12, 5, 3}, Case{64, 0, 1, 0}, Case{-1, 0, 1, 0}, Case{INT64_MAX, 7, 7, 1}}) {
    EXPECT_EQ(columns_per_group(c.group_size, c.columns), c.columns_per_group) << c.group_size << ", " << c.columns;
    EXPECT_EQ(groups_per_row(c.group_size, c.columns), c.groups) << c.group_size << ", " << c.columns;
  }
}

TEST(Grid, SmallestScalesAreThoseOfTheStorageTypes) {
  EXPECT_EQ(smallest_scale(at::kHalf), 0x1p-24);
  EXPECT_EQ(smallest_scale(at::kFloat), 0x1p-126);
  EXPECT_EQ(smallest_scale(at::kBFloat16), 0x1p-126);
  EXPECT_EQ(smallest_scale(at::kDouble), 0x1p-1022);
}

TEST(Grid, LargestScalesAreTheLastOfWhichTheLevelsAreFinite) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble}) {
    for (const int32_t levels : {1, 2, 3, 7, 8, 15, 127, 128, 255}) {
      const double largest = largest_scale(dtype, levels);
      const at::Tensor codes = at::full({1, 1}, levels - 128, at::kChar);
      const at::Tensor zero_points = at::full({1, 1}, -128, at::kChar);
      const auto value = [&](double scale) {
        return dequantize(codes, at::full({1, 1}, scale, at::kDouble).to(dtype), zero_points, 1).item<double>();
      };
      EXPECT_TRUE(std::isfinite(value(largest))) << dtype << ", " << levels;
      // The next scale is larger by at most 2^-7, the precision of bfloat16.
      EXPECT_FALSE(std::isfinite(value(largest * (1 + 0x1p-7)))) << dtype << ", " << levels;
    }
  }
  EXPECT_EQ(largest_scale(at::kHalf, 7), 9352);
  EXPECT_EQ(largest_scale(at::kHalf, 8), 8188);
  EXPECT_EQ(largest_scale(at::kDouble, 1), std::numeric_limits<double>::max());
}

TEST(Grid, RowsOfOrdinarySizeNeedNoUnits) {
  const at::Tensor weight = testing::normal({3, 20}, 1, at::kFloat);
  for (const at::Tensor& ordinary :
       {weight, weight * 0x1p-25, weight * 0x1p25, at::zeros({2, 3}), at::zeros({0, 4}), at::zeros({2, 0})}) {
    const ScaledWeight scaled = scaled_weight(ordinary, std::nullopt);
    EXPECT_TRUE(at::equal(scaled.values, ordinary));
    EXPECT_FALSE(scaled.units.defined());
    EXPECT_FALSE(scaled.exponents.defined());
  }
}

TEST(Grid, OtherRowsAreMultiplesOfPowersOfTwo) {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    at::Tensor weight = testing::normal({4, 20}, 1, dtype);
    const at::Tensor factors = at::tensor({0x1p-100, 1.0, 0x1p70, 0x1p-40}, at::kDouble).to(dtype).unsqueeze(1);
    const ScaledWeight scaled = scaled_weight(weight * factors, std::nullopt);
    const at::Tensor largest = scaled.values.abs().amax(1);
    EXPECT_TRUE(largest.ge(1).logical_and(largest.lt(4)).all().item<bool>()) << dtype;
    EXPECT_TRUE(at::equal((scaled.values * scaled.units.unsqueeze(1)).to(dtype), weight * factors)) << dtype;
    EXPECT_TRUE(at::equal(scaled.units.log2().to(at::kLong), scaled.exponents)) << dtype;
    EXPECT_EQ(scaled.exponents[1].item<int64_t>(), 0) << dtype;
  }
}

// A unit and its reciprocal are normal numbers for any weights.
TEST(Grid, UnitsOfTheSmallestAndTheLargestWeights) {
  for (const double weight : {0x1p-149, 0x1.fffffep127}) {
    const ScaledWeight scaled = scaled_weight(at::full({1, 2}, weight, at::kFloat), std::nullopt);
    EXPECT_EQ(scaled.values[0][0].item<double>() * scaled.units.item<double>(), weight);
    EXPECT_GE(scaled.units.item<double>(), 0x1p-126);
    EXPECT_LE(scaled.units.item<double>(), 0x1p126);
  }
}

TEST(Grid, MakesItsOwnContiguousCopiesOfGivenScales) {
  const at::Tensor weight = at::zeros({4, 6}, at::kBFloat16);
  const at::Tensor scales = at::full({2, 4}, 0.5, at::kBFloat16).mT();
  const at::Tensor zero_points = at::full({2, 4}, 3, at::kChar).mT();
  GridOptions options{{.group_size = 3, .symmetric = false}};
  options.scales = scales;
  options.zero_points = zero_points;
  const Grid grid = make_grid(weight, options);
  EXPECT_EQ(grid.scales.scalar_type(), at::kFloat);
  EXPECT_TRUE(grid.scales.is_contiguous());
  EXPECT_TRUE(grid.zero_points.is_contiguous());
  EXPECT_EQ(grid.codes.sizes(), weight.sizes());
  EXPECT_EQ(grid.codes.scalar_type(), at::kChar);
  EXPECT_EQ(grid.stored_scales().scalar_type(), at::kBFloat16);
  grid.scales.fill_(9);
  grid.zero_points.fill_(9);
  EXPECT_TRUE(scales.eq(0.5).all().item<bool>());
  EXPECT_TRUE(zero_points.eq(3).all().item<bool>());
}

TEST(Grid, CodesAreContiguousWhateverTheWeightsStrides) {
  EXPECT_TRUE(make_grid(at::zeros({6, 4}).mT(), {{.group_size = 3}}).codes.is_contiguous());
}

TEST(Grid, EveryGroupHasTheScaleOfItsOwnColumns) {
  // Column j holds j + 1, so the largest value of a group is its last column's.
  const at::Tensor weight = at::arange(1, 12, at::kDouble).unsqueeze(0).repeat({3, 1});
  for (const int64_t group_size : {1, 2, 4, 5, 11}) {
    const Grid grid = computed_grid(weight, 4, group_size, true);
    for (int64_t group = 0; group < grid.scales.size(1); ++group) {
      const double last = static_cast<double>(std::min<int64_t>((group + 1) * group_size, 11));
      EXPECT_TRUE(grid.scales.select(1, group).eq(last / 7).all().item<bool>()) << group_size << ", " << group;
    }
  }
}

TEST(Grid, ScalesAreRoundedToTheirStorageType) {
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    for (const bool symmetric : {true, false}) {
      const Grid grid = computed_grid(testing::normal({5, 40}, 1, dtype), 4, 8, symmetric);
      EXPECT_TRUE(at::equal(grid.scales, grid.scales.to(dtype).to(at::kFloat))) << dtype;
      EXPECT_TRUE(at::equal(grid.stored_scales().to(at::kFloat), grid.scales)) << dtype;
    }
  }
}

TEST(Grid, ScalesOfTinyWeightsDoNotRoundToZero) {
  struct Case {
    at::ScalarType dtype;
    double weight;
  };
  for (const Case& c : {Case{at::kHalf, 0x1p-24}, Case{at::kBFloat16, 0x1p-133}, Case{at::kFloat, 0x1p-149},
                        Case{at::kDouble, 0x1p-1074}}) {
    const Grid grid = computed_grid(at::full({1, 4}, c.weight, c.dtype), 8, 4, true);
    EXPECT_EQ(grid.scales.item<double>(), smallest_scale(c.dtype)) << c.dtype;
    EXPECT_GT(grid.stored_scales().item<double>(), 0.0) << c.dtype;
  }
}

}  // namespace
}  // namespace miniquant::algorithms
