#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/fetch-inl.h"
#include "kernels/microkernel-inl.h"
#include "kernels/transpose-inl.h"

// A += Y^T Y on both triangles, and A += X^T Y, tile by tile; X and Y are packed in tiles of kTileRows columns.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

template <typename T>
void pack_tile(const ScaledRows<T>& from, std::int64_t tile, T* tiles) {
  T* const packed = tiles + tile * from.count * kTileRows<T>;
  const std::int64_t first = tile * kTileRows<T>;
  const std::int64_t width = min_of(from.columns - first, kTileRows<T>);
  for (std::int64_t r = 0; r < from.count; ++r) {
    const T factor = from.factors == nullptr ? T(1) : from.factors[r];
    const T* const row = from.rows + r * from.ld + first;
    T* const to = column_of<T>(packed, r);
    if (width == kTileRows<T>) {
#pragma GCC unroll 8
      for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
        store<T>(to + v * kLanes<T>, factor * load<T>(row + v * kLanes<T>));
      }
    } else {
      for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
        to[lane] = lane < width ? factor * row[lane] : T(0);
      }
    }
  }
}

/// Rows of a tile of A, which is written after a product.
template <typename T>
struct UpdatedRows {
  T* first;
  std::int64_t ld;

  /// Fetches rows [begin, end), or those that a tile has.
  MINIQUANT_INLINE void fetch(std::int64_t begin, std::int64_t end) const {
    fetch_rows(first, ld, begin, min_of(end, kTileRows<T>), kTileRows<T>);
  }
};

/// product[j][i] = sum_r tile_j[r][j] tile_i[r][i] over `count` rows, [kTileRows][kTileRows]. Short sums are added up,
/// so rounding does not grow with `count`. Meanwhile the rows of A that the product is for are fetched, and the
/// beginning of `next_tile`, which is in place of tile_i in the next call.
template <typename T, std::int64_t kUpdated>
MINIQUANT_INLINE void multiply_tiles(const T* tile_j, const T* tile_i, std::int64_t count, const T* next_tile,
                                     const UpdatedRows<T> (&updated)[kUpdated], T* product) {
  constexpr std::int64_t kStrips = kTileRows<T> / kStripColumns;
  const std::int64_t rows_at_once = ceil_div(kTileRows<T>, kStrips * ceil_div(count, kTermsPerSum<T>));
  std::int64_t fetched = 0;
  for (std::int64_t row = 0; row < count; row += kTermsPerSum<T>) {
    const std::int64_t rows = min_of(count - row, kTermsPerSum<T>);
    const std::int64_t next = row + rows;
    const std::int64_t next_bytes = min_of(next < count ? count - next : count, kTermsPerSum<T>) * kTileRows<T> *
                                    static_cast<std::int64_t>(sizeof(T));
    Fetcher fetcher(Upcoming{{{next < count ? column_of<T>(tile_i, next) : next_tile, next_bytes},
                              {column_of<T>(tile_j, next < count ? next : 0), next_bytes}}});
    for (std::int64_t strip = 0; strip < kTileRows<T>; strip += kStripColumns) {
      for (const UpdatedRows<T>& one : updated) {
        one.fetch(fetched, fetched + rows_at_once);
      }
      fetched += rows_at_once;
      TileAccumulator<T> sum;
      clear(sum);
      FetchLines lines = fetcher.take(rows);
      accumulate(sum, column_of<T>(tile_j, row) + strip, {kTileRows<T>, 1}, column_of<T>(tile_i, row), kTileRows<T>,
                 rows, lines);
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
  T* const lower = a + j_begin * ld + i_begin;
  T* const upper = a + i_begin * ld + j_begin;
  alignas(kVectorBytes) T product[kTileRows<T> * kTileRows<T>];
  multiply_tiles(tiles + j_tile * tile_elements, tiles + i_tile * tile_elements, count,
                 tiles + (i_tile < j_tile ? i_tile + 1 : 0) * tile_elements, {{lower, ld}, {upper, ld}}, product);
  for (std::int64_t j = 0; j < j_width; ++j) {
    // i <= j where the tile lies on the diagonal
    const std::int64_t width = i_tile == j_tile ? j + 1 : kTileRows<T>;
    T* const row = lower + j * ld;
    for (std::int64_t i = 0; i < width; ++i) {
      row[i] += column_of<T>(product, j)[i];
    }
  }
  alignas(kVectorBytes) T mirrored[kTileRows<T> * kTileRows<T>];
  transpose(product, kTileRows<T>, kTileRows<T>, kTileRows<T>, mirrored, kTileRows<T>);
  for (std::int64_t i = 0; i < kTileRows<T>; ++i) {
    T* const row = upper + i * ld;
    for (std::int64_t j = i_tile == j_tile ? i + 1 : 0; j < j_width; ++j) {
      row[j] += column_of<T>(mirrored, i)[j];
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
  T* const updated = a + j_begin * columns + i_begin;
  multiply_tiles(left + j_tile * tile_elements, right + i_tile * tile_elements, count,
                 right + (i_begin + width < columns ? i_tile + 1 : 0) * tile_elements, {{updated, columns}}, product);
  for (std::int64_t j = 0; j < height; ++j) {
    T* const row = updated + j * columns;
    for (std::int64_t i = 0; i < width; ++i) {
      row[i] += column_of<T>(product, j)[i];
    }
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
