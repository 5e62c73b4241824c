#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "algorithms/finite.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

TEST(Finite, FindsOneValueThatIsNotFiniteAmongMany) {
  // One more than a piece, so the last value is alone in its piece.
  constexpr int64_t kCount = 65'537;
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    const at::Tensor values = testing::normal({kCount}, 1, dtype);
    EXPECT_TRUE(all_finite(values)) << dtype;
    for (const int64_t at : {int64_t{0}, int64_t{12345}, kCount - 1}) {
      for (const double bad : {std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(),
                               std::numeric_limits<double>::quiet_NaN()}) {
        at::Tensor changed = values.clone();
        changed[at] = bad;
        EXPECT_FALSE(all_finite(changed)) << dtype << " " << at << " " << bad;
      }
    }
  }
}

TEST(Finite, LargestValuesWhoseSumOverflowsAreFinite) {
  EXPECT_TRUE(all_finite(at::full({4}, std::numeric_limits<float>::max(), at::kFloat)));
  EXPECT_TRUE(all_finite(at::full({4}, 65504, at::kHalf)));
  EXPECT_TRUE(all_finite(at::full({4}, std::numeric_limits<double>::denorm_min(), at::kDouble)));
}

TEST(Finite, LooksAtTheElementsOfATensorAndAtNoOthers) {
  at::Tensor values = testing::normal({6, 8}, 2);
  values[3][5] = std::numeric_limits<double>::infinity();
  EXPECT_FALSE(all_finite(values.mT()));
  EXPECT_FALSE(all_finite(values.narrow(1, 4, 3)));
  EXPECT_TRUE(all_finite(values.narrow(1, 0, 5)));
  EXPECT_TRUE(all_finite(values.narrow(0, 0, 0)));
}

TEST(Finite, LargestMagnitudeIsThatOfOneElementAmongMany) {
  constexpr int64_t kCount = 65'537;
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    const at::Tensor values = testing::normal({kCount}, 1, dtype);
    EXPECT_EQ(largest_magnitude(values), values.abs().max().to(at::kDouble).item<double>()) << dtype;
    for (const int64_t at : {int64_t{0}, int64_t{12345}, kCount - 1}) {
      at::Tensor changed = values.clone();
      changed[at] = -1000;
      EXPECT_EQ(largest_magnitude(changed), 1000) << dtype << " " << at;
      changed[at] = -std::numeric_limits<double>::infinity();
      EXPECT_TRUE(std::isinf(largest_magnitude(changed))) << dtype << " " << at;
      changed[at] = std::numeric_limits<double>::quiet_NaN();
      EXPECT_TRUE(std::isnan(largest_magnitude(changed))) << dtype << " " << at;
    }
  }
  at::Tensor values = testing::normal({6, 8}, 2);
  values[3][5] = 7;
  EXPECT_EQ(largest_magnitude(values.narrow(1, 4, 3)), 7);
  EXPECT_LT(largest_magnitude(values.narrow(1, 0, 5)), 7);
  EXPECT_EQ(largest_magnitude(values.narrow(0, 0, 0)), 0);
}

}  // namespace
}  // namespace miniquant::algorithms
