// kernels/finite-inl.h: the largest magnitude as bits, against a scalar loop over the values.

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels/kernel_testing.h"

namespace miniquant::kernels::testing {
namespace {

std::int32_t largest_of(const KernelTable& table, const std::int32_t* values, std::int64_t count) {
  return table.largest_magnitude_bits_32(values, count);
}
std::int64_t largest_of(const KernelTable& table, const std::int64_t* values, std::int64_t count) {
  return table.largest_magnitude_bits_64(values, count);
}

template <typename T>
class LargestMagnitude : public ::testing::Test {};
TYPED_TEST_SUITE(LargestMagnitude, ElementTypes, ElementTypeNames);

// none, one, one AVX-512 vector of float32 and of float64 less one, itself and plus one; several vectors
constexpr std::int64_t kCounts[] = {0, 1, 7, 8, 9, 15, 16, 17, 100};

TYPED_TEST(LargestMagnitude, IsThatOfAScalarLoop) {
  using T = TypeParam;
  using Bits = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  std::mt19937_64 generator(1);
  for_each_table([&](const KernelTable& table) {
    for (const std::int64_t count : kCounts) {
      const std::vector<T> values = normal<T>(generator, count);
      GuardedBuffer<Bits> bits(count);
      const auto found = [&] { return std::bit_cast<T>(largest_of(table, bits.data(), count)); };
      T largest = 0;
      for (std::int64_t i = 0; i < count; ++i) {
        largest = std::max(largest, std::abs(values[i]));
        bits[i] = std::bit_cast<Bits>(values[i]);
      }
      ASSERT_EQ(found(), largest) << count;
      for (std::int64_t at = 0; at < count; ++at) {
        const Bits before = bits[at];
        bits[at] = std::bit_cast<Bits>(-std::numeric_limits<T>::infinity());
        ASSERT_TRUE(std::isinf(found())) << count << " " << at;
        bits[at] = std::bit_cast<Bits>(-std::numeric_limits<T>::quiet_NaN());
        ASSERT_TRUE(std::isnan(found())) << count << " " << at;
        bits[at] = before;
      }
    }
  });
}

TEST(LargestMagnitudeOfHalves, IsThatOfAScalarLoop) {
  std::mt19937_64 generator(2);
  for_each_table([&](const KernelTable& table) {
    // one AVX-512 vector less one, itself and plus one; several vectors
    for (const std::int64_t count : {0, 1, 31, 32, 33, 100}) {
      GuardedBuffer<std::int16_t> bits(count);
      std::int16_t largest = 0;
      for (std::int64_t i = 0; i < count; ++i) {
        bits[i] = static_cast<std::int16_t>(generator());
        largest = std::max(largest, static_cast<std::int16_t>(static_cast<std::uint16_t>(bits[i]) % 0x8000U));
      }
      ASSERT_EQ(table.largest_magnitude_bits_16(bits.data(), count), largest) << count;
    }
  });
}

}  // namespace
}  // namespace miniquant::kernels::testing
