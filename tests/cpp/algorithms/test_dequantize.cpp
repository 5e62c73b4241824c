// algorithms/dequantize.cpp, declared in algorithms/rtn.h.

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <limits>

#include "algorithms/rtn.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

at::Tensor integers(int64_t low, int64_t high, at::IntArrayRef sizes, std::uint64_t seed) {
  return at::randint(low, high, sizes, at::detail::createCPUGenerator(seed)).to(at::kChar);
}

TEST(Dequantize, IsCodeMinusZeroPointTimesTheScaleOfTheColumnsGroup) {
  constexpr int64_t kRows = 3;
  constexpr int64_t kColumns = 11;
  for (const int64_t group_size : {1, 4, 5, 11, 20, -1}) {
    const int64_t columns = group_size == -1 ? kColumns : group_size;
    const int64_t groups = (kColumns + columns - 1) / columns;
    for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
      const at::Tensor codes = integers(-128, 128, {kRows, kColumns}, 1);
      const at::Tensor zero_points = integers(-128, 128, {kRows, groups}, 2);
      const at::Tensor scales = testing::normal({kRows, groups}, 3).abs().to(dtype);
      const at::Tensor values = dequantize(codes, scales, zero_points, group_size);
      ASSERT_EQ(values.scalar_type(), dtype);
      ASSERT_EQ(values.sizes(), codes.sizes());
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t column = 0; column < kColumns; ++column) {
          const int64_t group = column / columns;
          // A difference of at most 255 times a scale of at most 53 bits: rounded once in float64, then to the dtype.
          const double exact = (codes[row][column].item<double>() - zero_points[row][group].item<double>()) *
                               scales[row][group].item<double>();
          const at::ScalarType computed = dtype == at::kDouble ? at::kDouble : at::kFloat;
          ASSERT_EQ(values[row][column].item<double>(),
                    at::scalar_tensor(exact, at::kDouble).to(computed).to(dtype).item<double>())
              << dtype << ", group size " << group_size << ", at " << row << ", " << column;
        }
      }
    }
  }
}

TEST(Dequantize, IsWhatOperationsGive) {
  const at::Tensor codes = integers(-128, 128, {300, 130}, 7);
  for (const int64_t group_size : {1, 32, 130}) {
    const int64_t groups = (130 + group_size - 1) / group_size;
    const at::Tensor zero_points = integers(-128, 128, {300, groups}, 8);
    for (const at::ScalarType stored : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
      const at::Tensor scales = testing::normal({300, groups}, 9).to(stored);
      for (const at::ScalarType result : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
        const at::Tensor values = dequantize(codes, scales, zero_points, group_size, result);
        EXPECT_EQ(values.scalar_type(), result);
        EXPECT_TRUE(at::equal(values, dequantize_by_operations(codes, scales, zero_points, group_size, result)))
            << group_size << ", " << stored << ", " << result;
      }
    }
  }
}

TEST(Dequantize, RoundsToBFloat16AsPyTorchDoes) {
  // Halfway between two values, next to that, beyond the largest one, subnormal, and not finite.
  const at::Tensor scales =
      at::tensor({1.00390625, 1.01171875, 1.0039063, 3.3961775e38, 3.4e38, 1e-40, -1.00390625, 0.0}, at::kFloat)
          .unsqueeze(1);
  const at::Tensor codes = at::ones({8, 1}, at::kChar);
  const at::Tensor zero_points = at::zeros({8, 1}, at::kChar);
  EXPECT_TRUE(at::equal(dequantize(codes, scales, zero_points, 1, at::kBFloat16), scales.to(at::kBFloat16)));
  const at::Tensor nan = at::full({8, 1}, std::numeric_limits<float>::quiet_NaN());
  EXPECT_TRUE(dequantize(codes, nan, zero_points, 1, at::kBFloat16).isnan().all().item<bool>());
}

TEST(Dequantize, TakesStridedArguments) {
  const at::Tensor codes = integers(-7, 8, {6, 5}, 4);
  const at::Tensor scales = testing::normal({3, 5}, 5).abs();
  const at::Tensor zero_points = integers(-7, 8, {3, 5}, 6);
  EXPECT_TRUE(
      at::equal(dequantize(codes.mT(), scales.mT(), zero_points.mT(), 2),
                dequantize(codes.mT().contiguous(), scales.mT().contiguous(), zero_points.mT().contiguous(), 2)));
}

TEST(Dequantize, KeepsEmptyShapes) {
  const auto bytes = at::TensorOptions().dtype(at::kChar);
  EXPECT_EQ(dequantize(at::empty({0, 8}, bytes), at::empty({0, 2}), at::empty({0, 2}, bytes), 4).sizes(),
            (std::vector<int64_t>{0, 8}));
  EXPECT_EQ(dequantize(at::empty({3, 0}, bytes), at::empty({3, 0}), at::empty({3, 0}, bytes), 4).sizes(),
            (std::vector<int64_t>{3, 0}));
}

}  // namespace
}  // namespace miniquant::algorithms
