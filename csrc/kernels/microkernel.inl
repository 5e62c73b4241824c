// The innermost loop, shared by everything that multiplies matrices here:
//   accumulator[c] += sum_k coefficient[k, c] * lanes[k, :]     c < kStripColumns, one tile of lanes

template <typename T>
struct TileAccumulator {
  Vector<T> value[kStripColumns][kVectorsPerTile];
};

template <typename T>
MINIQUANT_INLINE void clear(TileAccumulator<T>& accumulator) {
#pragma GCC unroll 8
  for (std::int64_t c = 0; c < kStripColumns; ++c) {
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
      accumulator.value[c][v] = Vector<T>{};
    }
  }
}

/// Reads `width` columns of [.][kTileRows] at `from`; the others become 0.
template <typename T>
MINIQUANT_INLINE void load(TileAccumulator<T>& accumulator, const T* from, std::int64_t width) {
#pragma GCC unroll 8
  for (std::int64_t c = 0; c < kStripColumns; ++c) {
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
      accumulator.value[c][v] = c < width ? load<T>(from + c * kTileRows<T> + v * kLanes<T>) : Vector<T>{};
    }
  }
}

template <typename T>
MINIQUANT_INLINE void store(const TileAccumulator<T>& accumulator, T* to, std::int64_t width) {
#pragma GCC unroll 8
  for (std::int64_t c = 0; c < kStripColumns; ++c) {
    if (c < width) {
#pragma GCC unroll 8
      for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
        store<T>(to + c * kTileRows<T> + v * kLanes<T>, accumulator.value[c][v]);
      }
    }
  }
}

template <typename T>
MINIQUANT_INLINE void add(TileAccumulator<T>& accumulator, const TileAccumulator<T>& other) {
#pragma GCC unroll 8
  for (std::int64_t c = 0; c < kStripColumns; ++c) {
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
      accumulator.value[c][v] += other.value[c][v];
    }
  }
}

/// Terms are added one after the other, so the sum is the same however `count` is split over calls.
template <typename T>
MINIQUANT_INLINE void accumulate(TileAccumulator<T>& accumulator, const T* coefficient, std::int64_t coefficient_stride,
                                 const T* lanes, std::int64_t count) {
  TileAccumulator<T> sum = accumulator;
  for (std::int64_t k = 0; k < count; ++k) {
    Vector<T> lane[kVectorsPerTile];
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
      lane[v] = load<T>(lanes + v * kLanes<T>);
    }
#pragma GCC unroll 8
    for (std::int64_t c = 0; c < kStripColumns; ++c) {
      const Vector<T> factor = broadcast<T>(coefficient[c]);
#pragma GCC unroll 8
      for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
        sum.value[c][v] = multiply_add(factor, lane[v], sum.value[c][v]);
      }
    }
    coefficient += coefficient_stride;
    lanes += kTileRows<T>;
  }
  accumulator = sum;
}

/// accumulator[c] += coefficient[c] * lanes for the columns c >= first: one more row of the triangle.
template <typename T>
MINIQUANT_INLINE void accumulate_row(TileAccumulator<T>& accumulator, const T* coefficient, std::int64_t first,
                                     const Vector<T>* lanes) {
#pragma GCC unroll 8
  for (std::int64_t c = 0; c < kStripColumns; ++c) {
    if (c >= first) {
#pragma GCC unroll 8
      for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
        accumulator.value[c][v] = multiply_add(broadcast<T>(coefficient[c]), lanes[v], accumulator.value[c][v]);
      }
    }
  }
}

/// tile[r][lane] of rows[lane][column(r)]: lanes past `rows` get 0.
template <typename T>
MINIQUANT_INLINE void transpose_into_tile(const T* from, std::int64_t ld, std::int64_t rows, const std::int64_t* column,
                                          std::int64_t columns, T* tile) {
  for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
    if (lane < rows) {
      const T* row = from + lane * ld;
      for (std::int64_t r = 0; r < columns; ++r) {
        tile[r * kTileRows<T> + lane] = row[column != nullptr ? column[r] : r];
      }
    } else {
      for (std::int64_t r = 0; r < columns; ++r) {
        tile[r * kTileRows<T> + lane] = T(0);
      }
    }
  }
}
