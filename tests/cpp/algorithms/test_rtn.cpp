#include <ATen/ops/clamp.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <optional>

#include "algorithms/rtn.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

QuantizedWeight nearest(const at::Tensor& weight, int64_t bits, int64_t group_size, bool symmetric) {
  return algorithms::rtn(weight, {{.bits = bits, .group_size = group_size, .symmetric = symmetric}});
}

/// A per-group oracle in ATen operations.
at::Tensor codes_from(const at::Tensor& weight, const QuantizedWeight& quantized, int64_t bits, int64_t group_size,
                      bool symmetric) {
  const auto half = static_cast<int64_t>(std::exp2(bits - 1));
  at::Tensor codes = at::zeros(weight.sizes(), at::kChar);
  for (int64_t group = 0; group < quantized.scales.size(1); ++group) {
    const int64_t begin = group * group_size;
    const int64_t end = std::min(begin + group_size, weight.size(1));
    const at::Tensor level = (weight.slice(1, begin, end) / quantized.scales.slice(1, group, group + 1)).round();
    codes.slice(1, begin, end)
        .copy_(at::clamp(level + quantized.zero_points.slice(1, group, group + 1), symmetric ? 1 - half : -half,
                         half - 1));
  }
  return codes;
}

TEST(Rtn, RoundsEveryGroupToItsOwnGrid) {
  const at::Tensor weight = testing::normal({100, 70}, 1).mul_(0.02);
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    for (int64_t bits = 2; bits <= 8; ++bits) {
      for (const bool symmetric : {true, false}) {
        for (const int64_t group_size : {1, 32, 64, 70}) {
          const at::Tensor values = weight.to(dtype);
          const QuantizedWeight quantized = nearest(values, bits, group_size, symmetric);
          EXPECT_TRUE(at::equal(quantized.codes, codes_from(values, quantized, bits, group_size, symmetric)))
              << dtype << ", " << bits << " bits, group size " << group_size << ", symmetric " << symmetric;
        }
      }
    }
  }
}

// The error is at most half a step, plus the shift of the grid's ends by rounding the scale and the zero point.
TEST(Rtn, ErrorIsAtMostHalfAStep) {
  const at::Tensor weight = testing::normal({20, 60}, 2);
  const QuantizedWeight symmetric = nearest(weight, 4, 20, true);
  const at::Tensor error = weight - dequantize(symmetric.codes, symmetric.scales, symmetric.zero_points, 20);
  EXPECT_TRUE(error.abs().le(symmetric.scales.repeat_interleave(20, 1) * (0.5 + 1e-12)).all().item<bool>());
  const QuantizedWeight asymmetric = nearest(weight, 4, 20, false);
  const at::Tensor other = weight - dequantize(asymmetric.codes, asymmetric.scales, asymmetric.zero_points, 20);
  EXPECT_TRUE(other.abs().le(asymmetric.scales.repeat_interleave(20, 1) * (1 + 1e-12)).all().item<bool>());
}

TEST(Rtn, UsesGivenScalesAndZeroPoints) {
  const at::Tensor weight = testing::normal({3, 8}, 3);
  const at::Tensor scales = testing::normal({3, 2}, 4).abs();
  const at::Tensor zero_points = at::zeros({3, 2}, at::kChar).fill_(2);
  GridOptions options{{.group_size = 4, .symmetric = false}};
  options.scales = scales;
  options.zero_points = zero_points;
  const QuantizedWeight quantized = algorithms::rtn(weight, options);
  EXPECT_TRUE(at::equal(quantized.scales, scales));
  EXPECT_TRUE(at::equal(quantized.zero_points, zero_points));
  EXPECT_TRUE(at::equal(quantized.codes, codes_from(weight, quantized, 4, 4, false)));
}

// The result is that of float32 with the stored scales.
TEST(Rtn, HalfPrecisionIsFloat32WithStoredScales) {
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    const at::Tensor weight = testing::normal({30, 50}, 5, dtype);
    const QuantizedWeight quantized = nearest(weight, 4, 16, true);
    EXPECT_EQ(quantized.scales.scalar_type(), dtype);
    GridOptions options{{.group_size = 16}};
    options.scales = quantized.scales.to(at::kFloat);
    const QuantizedWeight single = algorithms::rtn(weight.to(at::kFloat), options);
    EXPECT_TRUE(at::equal(quantized.codes, single.codes)) << dtype;
  }
}

TEST(Rtn, StridesAndThreadsDoNotMatter) {
  const at::Tensor weight = testing::normal({60, 200}, 6);
  QuantizedWeight one;
  {
    const testing::ScopedThreads threads(1);
    one = nearest(weight.mT(), 4, 7, true);
  }
  const testing::ScopedThreads threads(2);
  const QuantizedWeight two = nearest(weight.mT().contiguous(), 4, 7, true);
  EXPECT_TRUE(at::equal(one.codes, two.codes));
  EXPECT_TRUE(at::equal(one.scales, two.scales));
}

TEST(Rtn, ZerosAndEmptyShapes) {
  const QuantizedWeight zero = nearest(at::zeros({2, 5}), 4, 2, true);
  EXPECT_TRUE(zero.codes.eq(0).all().item<bool>());
  EXPECT_TRUE(zero.scales.eq(1).all().item<bool>());
  EXPECT_EQ(nearest(at::zeros({0, 5}), 4, 2, true).scales.sizes(), (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(nearest(at::zeros({2, 0}), 4, 2, true).scales.sizes(), (std::vector<int64_t>{2, 0}));
}

}  // namespace
}  // namespace miniquant::algorithms
