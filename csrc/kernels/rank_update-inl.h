#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/microkernel-inl.h"

// A += Y^T Y on both triangles, and A += X^T Y, tile by tile; X and Y are packed in tiles of kTileRows columns.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

template <typename T>
void pack_tile(const T* rows, std::int64_t ld, std::int64_t count, std::int64_t columns, std::int64_t tile, T* tiles) {
  T* const packed = tiles + tile * count * kTileRows<T>;
  const std::int64_t first = tile * kTileRows<T>;
  const std::int64_t width = min_of(columns - first, kTileRows<T>);
  for (std::int64_t r = 0; r < count; ++r) {
    for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
      column_of<T>(packed, r)[lane] = lane < width ? rows[r * ld + first + lane] : T(0);
    }
  }
}

/// product[j][i] = sum_r tile_j[r][j] tile_i[r][i] over `count` rows, [kTileRows][kTileRows]. Short sums are added up,
/// so rounding does not grow with `count`.
template <typename T>
MINIQUANT_INLINE void multiply_tiles(const T* tile_j, const T* tile_i, std::int64_t count, T* product) {
  for (std::int64_t row = 0; row < count; row += kTermsPerSum<T>) {
    const std::int64_t rows = min_of(count - row, kTermsPerSum<T>);
    for (std::int64_t strip = 0; strip < kTileRows<T>; strip += kStripColumns) {
      TileAccumulator<T> sum;
      clear(sum);
      accumulate(sum, column_of<T>(tile_j, row) + strip, {kTileRows<T>, 1}, column_of<T>(tile_i, row), kTileRows<T>,
                 rows);
      T* const to = column_of<T>(product, strip);
      if (row > 0) {
        TileAccumulator<T> earlier;
        load(earlier, to, kTileRows<T>, kStripColumns);
        add(sum, earlier, T(1));
      }
      store(sum, to, kTileRows<T>, kStripColumns);
    }
  }
}

template <typename T>
void rank_update(T* a, std::int64_t ld, std::int64_t columns, const T* tiles, std::int64_t count, std::int64_t i_tile,
                 std::int64_t j_tile) {
  const std::int64_t tile_elements = count * kTileRows<T>;
  const std::int64_t j_begin = j_tile * kTileRows<T>;
  const std::int64_t j_width = min_of(columns - j_begin, kTileRows<T>);
  const std::int64_t i_begin = i_tile * kTileRows<T>;
  alignas(kVectorBytes) T product[kTileRows<T> * kTileRows<T>];
  multiply_tiles(tiles + j_tile * tile_elements, tiles + i_tile * tile_elements, count, product);
  for (std::int64_t j = 0; j < j_width; ++j) {
    // i <= j where the tile lies on the diagonal
    const std::int64_t width = i_tile == j_tile ? j + 1 : kTileRows<T>;
    T* const row = a + (j_begin + j) * ld + i_begin;
    for (std::int64_t i = 0; i < width; ++i) {
      row[i] += column_of<T>(product, j)[i];
    }
  }
  for (std::int64_t i = 0; i < kTileRows<T>; ++i) {
    T* const row = a + (i_begin + i) * ld + j_begin;
    for (std::int64_t j = i_tile == j_tile ? i + 1 : 0; j < j_width; ++j) {
      row[j] += column_of<T>(product, j)[i];
    }
  }
}

template <typename T>
void product_update(T* a, std::int64_t rows, std::int64_t columns, const T* left, const T* right, std::int64_t count,
                    std::int64_t j_tile, std::int64_t i_tile) {
  const std::int64_t tile_elements = count * kTileRows<T>;
  const std::int64_t j_begin = j_tile * kTileRows<T>;
  const std::int64_t i_begin = i_tile * kTileRows<T>;
  const std::int64_t height = min_of(rows - j_begin, kTileRows<T>);
  const std::int64_t width = min_of(columns - i_begin, kTileRows<T>);
  alignas(kVectorBytes) T product[kTileRows<T> * kTileRows<T>];
  multiply_tiles(left + j_tile * tile_elements, right + i_tile * tile_elements, count, product);
  for (std::int64_t j = 0; j < height; ++j) {
    T* const row = a + (j_begin + j) * columns + i_begin;
    for (std::int64_t i = 0; i < width; ++i) {
      row[i] += column_of<T>(product, j)[i];
    }
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
