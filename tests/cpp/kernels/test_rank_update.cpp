// kernels/rank_update.inl: A += sign * Y^T Y.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/kernel_testing.h"

namespace miniquant::kernels::testing {
namespace {

template <typename T>
class RankUpdate : public ::testing::Test {
 protected:
  static std::int64_t tiles_of(const TypedKernels<T>& kernel, std::int64_t columns) {
    return (columns + kernel.tile_rows - 1) / kernel.tile_rows;
  }
};
TYPED_TEST_SUITE(RankUpdate, ElementTypes, ElementTypeNames);

TYPED_TEST(RankUpdate, PacksATileWithZerosPastTheColumns) {
  using T = TypeParam;
  constexpr std::int64_t kRows = 3;
  std::mt19937_64 generator(3);
  for_each_instruction_set<T>([&](const auto& kernel) {
    const std::int64_t columns = kernel.tile_rows + 5;
    const std::int64_t ld = columns + 2;
    const GuardedBuffer<T> rows(normal<T>(generator, (kRows - 1) * ld + columns));
    GuardedBuffer<T> tiles(2 * kRows * kernel.tile_rows);
    for (std::int64_t tile = 0; tile < 2; ++tile) {
      kernel.pack_tile(rows.data(), ld, kRows, columns, tile, tiles.data());
      for (std::int64_t r = 0; r < kRows; ++r) {
        for (std::int64_t lane = 0; lane < kernel.tile_rows; ++lane) {
          const std::int64_t column = tile * kernel.tile_rows + lane;
          ASSERT_EQ(tiles[(tile * kRows + r) * kernel.tile_rows + lane],
                    column < columns ? rows[r * ld + column] : T(0));
        }
      }
    }
  });
}

// The error of a sum of `count` products that is then added to A: (count + 2) eps times the sum of magnitudes.
TYPED_TEST(RankUpdate, AddsTheProductsToTheLowerTriangle) {
  using T = TypeParam;
  std::mt19937_64 generator(4);
  for_each_instruction_set<T>([&](const auto& kernel) {
    const std::int64_t lanes = kernel.tile_rows;
    // one column; a tile less one; a tile; a tile plus one; three tiles, the last not filled
    for (const std::int64_t columns : {std::int64_t{1}, lanes - 1, lanes, lanes + 1, 2 * lanes + 3}) {
      for (const std::int64_t count : {1, 2, 67}) {
        for (const bool mirror : {false, true}) {
          SCOPED_TRACE(::testing::Message() << columns << " columns, " << count << " rows, mirror " << mirror);
          const std::int64_t ld = columns + 1;
          const std::int64_t tiles = this->tiles_of(kernel, columns);
          const GuardedBuffer<T> y(normal<T>(generator, count * columns));
          GuardedBuffer<T> packed(tiles * count * lanes);
          GuardedBuffer<T> a(normal<T>(generator, (columns - 1) * ld + columns));
          const std::vector<T> before = a.values();
          const T sign = mirror ? T(1) : T(-1);
          for (std::int64_t tile = 0; tile < tiles; ++tile) {
            kernel.pack_tile(y.data(), columns, count, columns, tile, packed.data());
          }
          for (std::int64_t tile = 0; tile < tiles; ++tile) {
            kernel.rank_update(a.data(), ld, columns, packed.data(), count, 0, tile + 1, tile, sign, mirror);
          }
          for (std::int64_t j = 0; j < columns; ++j) {
            for (std::int64_t i = 0; i < columns; ++i) {
              const T was = before[static_cast<std::size_t>(j * ld + i)];
              Wide<T> expected = was;
              Wide<T> magnitude = std::abs(expected);
              for (std::int64_t r = 0; (mirror || i <= j) && r < count; ++r) {
                const Wide<T> product = static_cast<Wide<T>>(y[r * columns + j]) * y[r * columns + i];
                expected += sign * product;
                magnitude += std::abs(product);
              }
              ASSERT_LE(std::abs(a[j * ld + i] - expected), static_cast<Wide<T>>(count + 2) * kEps<T> * magnitude)
                  << j << ", " << i;
            }
          }
        }
      }
    }
  });
}

TYPED_TEST(RankUpdate, TilesOneByOneOrTogetherGiveTheSameBits) {
  using T = TypeParam;
  constexpr std::int64_t kCount = 9;
  std::mt19937_64 generator(5);
  for_each_instruction_set<T>([&](const auto& kernel) {
    const std::int64_t columns = 3 * kernel.tile_rows - 2;
    GuardedBuffer<T> packed(3 * kCount * kernel.tile_rows);
    const GuardedBuffer<T> y(normal<T>(generator, kCount * columns));
    for (std::int64_t tile = 0; tile < 3; ++tile) {
      kernel.pack_tile(y.data(), columns, kCount, columns, tile, packed.data());
    }
    GuardedBuffer<T> together(std::vector<T>(static_cast<std::size_t>(columns * columns), T(0.5)));
    GuardedBuffer<T> apart(together.values());
    for (std::int64_t j = 0; j < 3; ++j) {
      kernel.rank_update(together.data(), columns, columns, packed.data(), kCount, 0, j + 1, j, T(1), true);
    }
    for (std::int64_t j = 2; j >= 0; --j) {
      for (std::int64_t i = j; i >= 0; --i) {
        kernel.rank_update(apart.data(), columns, columns, packed.data(), kCount, i, i + 1, j, T(1), true);
      }
    }
    EXPECT_EQ(apart.values(), together.values());
  });
}

}  // namespace
}  // namespace miniquant::kernels::testing
