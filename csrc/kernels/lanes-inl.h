#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/kernels.h"
#include "kernels/transpose-inl.h"
#include "kernels/vector-inl.h"

// Shared by kernels that take rows of W as lanes: their arrays are [tile][column][lane].

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// Columns of E whose tile stays in the first-level cache while every strip of a block reads it: whole panels.
template <typename T>
constexpr std::int64_t kDepth = 18432 / (kTileRows<T> * static_cast<std::int64_t>(sizeof(T)));

template <typename T>
constexpr std::int64_t kElementsPerDouble = 1;
template <>
constexpr std::int64_t kElementsPerDouble<float> = 2;

/// Cuts a workspace, aligned to 64 bytes, into arrays with the same alignment. Without a workspace it counts their
/// elements.
template <typename T>
struct WorkspaceCutter {
  T* workspace;
  std::int64_t used = 0;  // in elements of T

  MINIQUANT_INLINE T* take(std::int64_t count) {
    constexpr std::int64_t kAlign = 64 / static_cast<std::int64_t>(sizeof(T));
    T* const at = workspace + used;
    used += ceil_div(count, kAlign) * kAlign;
    return at;
  }
};

/// Columns [begin, end), in the order of the sweep.
struct Span {
  std::int64_t begin;
  std::int64_t end;

  [[nodiscard]] MINIQUANT_INLINE std::int64_t size() const { return end - begin; }
};

/// The first `count` columns from `begin` on, cut off at `end`.
MINIQUANT_INLINE Span span_of(std::int64_t begin, std::int64_t count, std::int64_t end) {
  return {begin, end - begin < count ? end : begin + count};
}

/// tile[r][lane] = from[lane][r] for r < columns, rows `ld` apart; lanes past `rows` get 0.
template <typename T>
MINIQUANT_INLINE void transpose_into_tile(const T* from, std::int64_t ld, std::int64_t rows, std::int64_t columns,
                                          T* tile) {
  transpose(from, ld, rows, columns, tile, kTileRows<T>);
  for (std::int64_t r = 0; r < columns; ++r) {
    for (std::int64_t lane = rows; lane < kTileRows<T>; ++lane) {
      column_of<T>(tile, r)[lane] = T(0);
    }
  }
}

/// Adds a range to those that come next. Where there is no room it is left out.
template <typename T>
MINIQUANT_INLINE void add_range(Upcoming& upcoming, const T* begin, std::int64_t count) {
  for (Upcoming::Range& range : upcoming.ranges) {
    if (range.bytes == 0) {
      range = {begin, count * static_cast<std::int64_t>(sizeof(T))};
      return;
    }
  }
}

/// Columns of an array [column][lane] come next.
template <typename T>
MINIQUANT_INLINE void add_columns(Upcoming& upcoming, const T* array, Span columns) {
  add_range(upcoming, column_of<T>(array, columns.begin), columns.size() * kTileRows<T>);
}

/// Rows of the panels that hold `columns` come next.
template <typename T, typename Layout>
MINIQUANT_INLINE void add_rows(Upcoming& upcoming, const T* matrix, Layout layout, Span rows, Span columns) {
  const std::int64_t panels = rows.size() > 0 ? panel_count(columns.end) : 0;
  for (std::int64_t panel = columns.begin / kPanelColumns; panel < panels; ++panel) {
    add_range(upcoming, matrix + layout.offset(rows.begin, panel), rows.size() * kPanelColumns);
  }
}

/// The columns from `first` on that are in one stored group, cut off at `end`.
MINIQUANT_INLINE Span group_of(std::int64_t group_size, std::int64_t first, std::int64_t end) {
  return span_of(first, group_size - first % group_size, end);
}

/// The columns from `first` on that one set of accumulators takes. Ends at a multiple of kStripColumns, so a strip lies
/// in one panel.
MINIQUANT_INLINE Span strip_of(std::int64_t first, std::int64_t end) {
  return span_of(first, kStripColumns - first % kStripColumns, end);
}

/// Columns whose losses are summed in T before they are added in float64; the same for every instruction set.
constexpr std::int64_t kColumnsPerLoss = 4;
static_assert(kStripColumns % kColumnsPerLoss == 0);

/// to += loss; loss = 0.
template <typename T>
MINIQUANT_INLINE void add_loss(Vector<T>* loss, double* to) {
  T lanes[kTileRows<T>];
  for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
    store<T>(lanes + v * kLanes<T>, loss[v]);
    loss[v] = Vector<T>{};
  }
  for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
    to[lane] += static_cast<double>(lanes[lane]);
  }
}

/// Columns copied between rows and lanes at a time: few enough that what the lanes write stays in the cache.
constexpr std::int64_t kColumnsPerCopy = 128;

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
