// A += sign * Y^T Y on the lower triangle, tile by tile; Y is packed in tiles of kTileRows columns.

template <typename T>
void pack_tile(const T* rows, std::int64_t ld, std::int64_t count, std::int64_t columns, std::int64_t tile, T* tiles) {
  T* const packed = tiles + tile * count * kTileRows<T>;
  const std::int64_t first = tile * kTileRows<T>;
  const std::int64_t width = columns - first < kTileRows<T> ? columns - first : kTileRows<T>;
  for (std::int64_t r = 0; r < count; ++r) {
    for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
      packed[r * kTileRows<T> + lane] = lane < width ? rows[r * ld + first + lane] : T(0);
    }
  }
}

template <typename T>
void rank_update(T* a, std::int64_t ld, std::int64_t columns, const T* tiles, std::int64_t count,
                 std::int64_t i_tile_begin, std::int64_t i_tile_end, std::int64_t j_tile, T sign, bool mirror) {
  const std::int64_t tile_elements = count * kTileRows<T>;
  for (std::int64_t i_tile = i_tile_begin; i_tile < i_tile_end && i_tile <= j_tile; ++i_tile) {
    const std::int64_t i_begin = i_tile * kTileRows<T>;
    for (std::int64_t strip = 0; strip < kTileRows<T>; strip += kStripColumns) {
      TileAccumulator<T> accumulator;
      clear(accumulator);
      accumulate(accumulator, tiles + j_tile * tile_elements + strip, kTileRows<T>, tiles + i_tile * tile_elements,
                 count);
      T product[kStripColumns * kTileRows<T>];
      store(accumulator, product, kStripColumns);
      for (std::int64_t c = 0; c < kStripColumns; ++c) {
        const std::int64_t j = j_tile * kTileRows<T> + strip + c;
        if (j >= columns) {
          break;
        }
        const std::int64_t to_diagonal = j + 1 - i_begin;
        const std::int64_t width = to_diagonal < kTileRows<T> ? to_diagonal : kTileRows<T>;
        for (std::int64_t lane = 0; lane < width; ++lane) {
          a[j * ld + i_begin + lane] += sign * product[c * kTileRows<T> + lane];
        }
        for (std::int64_t lane = 0; mirror && lane < width && i_begin + lane < j; ++lane) {
          a[(i_begin + lane) * ld + j] += sign * product[c * kTileRows<T> + lane];
        }
      }
    }
  }
}
