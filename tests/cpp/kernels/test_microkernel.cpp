// kernels/microkernel-inl.h, tested through rank_update, which does little else.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/kernel_testing.h"

namespace miniquant::kernels::testing {
namespace {

template <typename T>
class Microkernel : public ::testing::Test {
 protected:
  /// The full matrix Y^T Y of Y [count, columns].
  static std::vector<T> products(const TypedKernels<T>& kernel, const std::vector<T>& y, std::int64_t count,
                                 std::int64_t columns) {
    const std::int64_t tiles = (columns + kernel.tile_rows - 1) / kernel.tile_rows;
    GuardedBuffer<T> packed(tiles * count * kernel.tile_rows);
    GuardedBuffer<T> a(std::vector<T>(static_cast<std::size_t>(columns * columns), T(0)));
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      kernel.pack_tile({y.data(), columns, count, columns, nullptr}, tile, packed.data());
    }
    for (std::int64_t j = 0; j < tiles; ++j) {
      for (std::int64_t i = 0; i <= j; ++i) {
        kernel.rank_update(a.data(), columns, columns, packed.data(), count, i, j);
      }
    }
    return a.values();
  }
};
TYPED_TEST_SUITE(Microkernel, ElementTypes, ElementTypeNames);

// Terms are added one after the other, so lane position, tile and vector length do not change the bits.
TYPED_TEST(Microkernel, AddsTermsInOrderWithOrWithoutFusing) {
  using T = TypeParam;
  constexpr std::int64_t kCount = 41;
  constexpr std::int64_t kColumns = 13;
  std::mt19937_64 generator(6);
  const std::vector<T> y = normal<T>(generator, kCount * kColumns);
  for_each_instruction_set<T>([&](const auto& kernel) {
    const bool fused = &kernel != &typed_kernels<T>(kernels_for(InstructionSet::kBaseline));
    const std::vector<T> got = this->products(kernel, y, kCount, kColumns);
    for (std::int64_t j = 0; j < kColumns; ++j) {
      for (std::int64_t i = 0; i <= j; ++i) {
        T sum = 0;
        for (std::int64_t r = 0; r < kCount; ++r) {
          const T a = y[static_cast<std::size_t>(r * kColumns + j)];
          const T b = y[static_cast<std::size_t>(r * kColumns + i)];
          sum = fused ? std::fma(a, b, sum) : sum + a * b;
        }
        ASSERT_EQ(got[static_cast<std::size_t>(j * kColumns + i)], sum) << j << ", " << i;
      }
    }
  });
}

}  // namespace
}  // namespace miniquant::kernels::testing
