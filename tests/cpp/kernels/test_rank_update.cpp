// kernels/rank_update-inl.h: A += Y^T Y, and A += X^T Y.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <utility>
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
    const GuardedBuffer<T> factors(normal<T>(generator, kRows));
    GuardedBuffer<T> tiles(2 * kRows * kernel.tile_rows);
    for (const T* const of_rows : {static_cast<const T*>(nullptr), factors.data()}) {
      for (std::int64_t tile = 0; tile < 2; ++tile) {
        kernel.pack_tile({rows.data(), ld, kRows, columns, of_rows}, tile, tiles.data());
        for (std::int64_t r = 0; r < kRows; ++r) {
          const T factor = of_rows == nullptr ? T(1) : of_rows[r];
          for (std::int64_t lane = 0; lane < kernel.tile_rows; ++lane) {
            const std::int64_t column = tile * kernel.tile_rows + lane;
            ASSERT_EQ(tiles[(tile * kRows + r) * kernel.tile_rows + lane],
                      column < columns ? factor * rows[r * ld + column] : T(0));
          }
        }
      }
    }
  });
}

// The error of a sum of `count` products that is then added to A: (count + 2) eps times the sum of magnitudes.
TYPED_TEST(RankUpdate, AddsTheProductsToBothTriangles) {
  using T = TypeParam;
  std::mt19937_64 generator(4);
  for_each_instruction_set<T>([&](const auto& kernel) {
    const std::int64_t lanes = kernel.tile_rows;
    // one column; a tile less one; a tile; a tile plus one; three tiles, the last partly filled
    for (const std::int64_t columns : {std::int64_t{1}, lanes - 1, lanes, lanes + 1, 2 * lanes + 3}) {
      // 96 and 48 rows are summed at a time in float32 and float64
      for (const std::int64_t count : {1, 2, 67, 97}) {
        SCOPED_TRACE(::testing::Message() << columns << " columns, " << count << " rows");
        const std::int64_t ld = columns + 1;
        const std::int64_t tiles = this->tiles_of(kernel, columns);
        const GuardedBuffer<T> y(normal<T>(generator, count * columns));
        GuardedBuffer<T> packed(tiles * count * lanes);
        GuardedBuffer<T> a(normal<T>(generator, (columns - 1) * ld + columns));
        const std::vector<T> before = a.values();
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
          kernel.pack_tile({y.data(), columns, count, columns, nullptr}, tile, packed.data());
        }
        for (std::int64_t j = 0; j < tiles; ++j) {
          for (std::int64_t i = 0; i <= j; ++i) {
            kernel.rank_update(a.data(), ld, columns, packed.data(), count, i, j);
          }
        }
        for (std::int64_t j = 0; j < columns; ++j) {
          for (std::int64_t i = 0; i < columns; ++i) {
            const T was = before[static_cast<std::size_t>(j * ld + i)];
            Wide<T> expected = was;
            Wide<T> magnitude = std::abs(expected);
            for (std::int64_t r = 0; r < count; ++r) {
              const Wide<T> product = static_cast<Wide<T>>(y[r * columns + j]) * y[r * columns + i];
              expected += product;
              magnitude += std::abs(product);
            }
            ASSERT_LE(std::abs(a[j * ld + i] - expected), static_cast<Wide<T>>(count + 2) * kEps<T> * magnitude)
                << j << ", " << i;
          }
          if (j + 1 < columns) {
            ASSERT_EQ(a[j * ld + columns], before[static_cast<std::size_t>(j * ld + columns)]) << "past the columns";
          }
        }
      }
    }
  });
}

TYPED_TEST(RankUpdate, AddsTheProductOfTwo) {
  using T = TypeParam;
  std::mt19937_64 generator(5);
  for_each_instruction_set<T>([&](const auto& kernel) {
    const std::int64_t lanes = kernel.tile_rows;
    for (const auto& [rows, columns] :
         {std::pair{std::int64_t{1}, lanes}, {lanes + 1, std::int64_t{2}}, {2 * lanes, lanes - 1}}) {
      for (const std::int64_t count : {1, 97}) {
        SCOPED_TRACE(::testing::Message() << rows << " by " << columns << ", " << count << " rows");
        const GuardedBuffer<T> x(normal<T>(generator, count * rows));
        const GuardedBuffer<T> y(normal<T>(generator, count * columns));
        GuardedBuffer<T> left(this->tiles_of(kernel, rows) * count * lanes);
        GuardedBuffer<T> right(this->tiles_of(kernel, columns) * count * lanes);
        GuardedBuffer<T> a(normal<T>(generator, rows * columns));
        const std::vector<T> before = a.values();
        for (std::int64_t tile = 0; tile < this->tiles_of(kernel, rows); ++tile) {
          kernel.pack_tile({x.data(), rows, count, rows, nullptr}, tile, left.data());
        }
        for (std::int64_t tile = 0; tile < this->tiles_of(kernel, columns); ++tile) {
          kernel.pack_tile({y.data(), columns, count, columns, nullptr}, tile, right.data());
        }
        for (std::int64_t j = 0; j < this->tiles_of(kernel, rows); ++j) {
          for (std::int64_t i = 0; i < this->tiles_of(kernel, columns); ++i) {
            kernel.product_update(a.data(), rows, columns, left.data(), right.data(), count, j, i);
          }
        }
        for (std::int64_t j = 0; j < rows; ++j) {
          for (std::int64_t i = 0; i < columns; ++i) {
            Wide<T> expected = before[static_cast<std::size_t>(j * columns + i)];
            Wide<T> magnitude = std::abs(expected);
            for (std::int64_t r = 0; r < count; ++r) {
              const Wide<T> product = static_cast<Wide<T>>(x[r * rows + j]) * y[r * columns + i];
              expected += product;
              magnitude += std::abs(product);
            }
            ASSERT_LE(std::abs(a[j * columns + i] - expected), static_cast<Wide<T>>(count + 2) * kEps<T> * magnitude)
                << j << ", " << i;
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace miniquant::kernels::testing
