#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/fetch-inl.h"
#include "kernels/triangle.h"
#include "kernels/vector-inl.h"

// The innermost loop of every matrix product here:
//   accumulator[c] += sum_k coefficient[k, c] * lanes[k, :]     c < kStripColumns, one tile of lanes

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// Terms that a matrix product sums before it adds their sum to the total, so rounding does not grow with the number of
/// terms, and the data read stay in the first-level cache. The same for every instruction set.
template <typename T>
constexpr std::int64_t kTermsPerSum = 384 / static_cast<std::int64_t>(sizeof(T));

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

/// Reads `width` rows of a tile at `from`, `row` elements apart; the other rows become 0.
template <typename T>
MINIQUANT_INLINE void load(TileAccumulator<T>& accumulator, const T* from, std::int64_t row, std::int64_t width) {
#pragma GCC unroll 8
  for (std::int64_t c = 0; c < kStripColumns; ++c) {
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
      accumulator.value[c][v] = c < width ? load<T>(from + c * row + v * kLanes<T>) : Vector<T>{};
    }
  }
}

template <typename T>
MINIQUANT_INLINE void store(const TileAccumulator<T>& accumulator, T* to, std::int64_t row, std::int64_t width) {
#pragma GCC unroll 8
  for (std::int64_t c = 0; c < kStripColumns; ++c) {
    if (c < width) {
#pragma GCC unroll 8
      for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
        store<T>(to + c * row + v * kLanes<T>, accumulator.value[c][v]);
      }
    }
  }
}

/// accumulator += sign * other.
template <typename T>
MINIQUANT_INLINE void add(TileAccumulator<T>& accumulator, const TileAccumulator<T>& other, T sign) {
#pragma GCC unroll 8
  for (std::int64_t c = 0; c < kStripColumns; ++c) {
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
      accumulator.value[c][v] += sign * other.value[c][v];
    }
  }
}

/// The distances between the coefficients of two terms, and of two accumulators.
struct Strides {
  std::int64_t term;
  std::int64_t strip;
};

/// Adds terms one after the other, so the sum is the same however `count` is split over calls.
template <typename T, typename Fetch>
MINIQUANT_INLINE void accumulate(TileAccumulator<T>& accumulator, const T* coefficient, Strides coefficient_strides,
                                 const T* lanes, std::int64_t lanes_stride, std::int64_t count, Fetch& fetch) {
  TileAccumulator<T> sum = accumulator;
  for (std::int64_t k = 0; k < count; ++k) {
    Vector<T> lane[kVectorsPerTile];
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
      lane[v] = load<T>(lanes + v * kLanes<T>);
    }
#pragma GCC unroll 8
    for (std::int64_t c = 0; c < kStripColumns; ++c) {
      const Vector<T> factor = broadcast<T>(coefficient[c * coefficient_strides.strip]);
#pragma GCC unroll 8
      for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
        sum.value[c][v] = multiply_add(factor, lane[v], sum.value[c][v]);
      }
    }
    fetch.with_term();
    coefficient += coefficient_strides.term;
    lanes += lanes_stride;
  }
  accumulator = sum;
}

template <typename T>
MINIQUANT_INLINE void accumulate(TileAccumulator<T>& accumulator, const T* coefficient, Strides coefficient_strides,
                                 const T* lanes, std::int64_t lanes_stride, std::int64_t count) {
  FetchNothing nothing;
  accumulate(accumulator, coefficient, coefficient_strides, lanes, lanes_stride, count, nothing);
}

/// Reads one row of a tile.
template <typename T>
MINIQUANT_INLINE void load_lanes(const T* from, Vector<T>* lanes) {
#pragma GCC unroll 8
  for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
    lanes[v] = load<T>(from + v * kLanes<T>);
  }
}

/// Adds one term to the accumulators [first, last).
template <typename T>
MINIQUANT_INLINE void accumulate_term(TileAccumulator<T>& accumulator, const T* coefficient, std::int64_t strip_stride,
                                      const Vector<T>* lanes, std::int64_t first, std::int64_t last) {
#pragma GCC unroll 8
  for (std::int64_t c = 0; c < kStripColumns; ++c) {
    if (c >= first && c < last) {
#pragma GCC unroll 8
      for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
        accumulator.value[c][v] =
            multiply_add(broadcast<T>(coefficient[c * strip_stride]), lanes[v], accumulator.value[c][v]);
      }
    }
  }
}

/// accumulator[c] += sum over i in [begin, end) of L[first + c, i] * lanes[i - begin, :], lanes [.][kTileRows], for a
/// triangle L in TriangleLayout and end <= first + 1.
template <typename T, typename Fetch>
MINIQUANT_INLINE void accumulate_rows_of(const T* triangle, TriangleLayout layout, std::int64_t first,
                                         std::int64_t begin, std::int64_t end, const T* lanes,
                                         TileAccumulator<T>& accumulator, Fetch& fetch) {
  for (std::int64_t i = begin; i < end;) {
    const std::int64_t panel = i / kPanelColumns;
    const std::int64_t panel_end = (panel + 1) * kPanelColumns;
    const std::int64_t stop = min_of(panel_end, end);
    const T* const coefficients = triangle + layout.offset(first, panel) + i % kPanelColumns;
    fetch.with_panel(coefficients);
    accumulate(accumulator, coefficients, {1, kPanelColumns}, column_of<T>(lanes, i - begin), kTileRows<T>, stop - i,
               fetch);
    i = stop;
  }
}

template <typename T>
MINIQUANT_INLINE void accumulate_rows_of(const T* triangle, TriangleLayout layout, std::int64_t first,
                                         std::int64_t begin, std::int64_t end, const T* lanes,
                                         TileAccumulator<T>& accumulator) {
  FetchNothing nothing;
  accumulate_rows_of(triangle, layout, first, begin, end, lanes, accumulator, nothing);
}

/// &L[row, column] of a triangle.
template <typename T>
MINIQUANT_INLINE const T* entry(const T* triangle, TriangleLayout layout, std::int64_t row, std::int64_t column) {
  return triangle + layout.offset(row, column / kPanelColumns) + column % kPanelColumns;
}

/// &H[row, column] of a symmetric matrix.
template <typename T>
MINIQUANT_INLINE const T* symmetric_entry(const T* symmetric, SymmetricLayout layout, std::int64_t row,
                                          std::int64_t column) {
  return symmetric + layout.offset(row, column / kPanelColumns) + column % kPanelColumns;
}

/// accumulator[c] += sum over i in [begin, end) of L[i, first + c] * lanes[i - begin, :], for begin >= first + c and a
/// strip that lies in one panel.
template <typename T, typename Fetch>
MINIQUANT_INLINE void accumulate_columns_of(const T* triangle, TriangleLayout layout, std::int64_t first,
                                            std::int64_t begin, std::int64_t end, const T* lanes,
                                            TileAccumulator<T>& accumulator, Fetch& fetch) {
  if (begin < end) {
    accumulate(accumulator, entry(triangle, layout, begin, first), {kPanelColumns, 1}, lanes, kTileRows<T>, end - begin,
               fetch);
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
