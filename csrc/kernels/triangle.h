#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"

namespace miniquant::kernels {

/// Columns per panel of a triangle: a multiple of the tile of every kernel.
inline constexpr std::int64_t kPanelColumns = 48;

/// Rows after the last one: a strip of columns, read whole, may pass the end by as many.
inline constexpr std::int64_t kSpareRows = 7;

/// Panels that hold `columns` columns.
[[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t panel_count(std::int64_t columns) {
  return ceil_div(columns, kPanelColumns);
}

/// Where a lower triangle L [K, K] lies: in panels of kPanelColumns columns, one after the other, each row by row from
/// the panel's first row of the triangle on. L[j, i] is element offset(j, i / kPanelColumns) + i % kPanelColumns. What
/// lies above the diagonal or past the last row or column takes room and means nothing.
struct TriangleLayout {
  std::int64_t columns;  ///< K

  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t panels() const { return panel_count(columns); }

  /// The first element of `row` in a panel that holds it: row >= panel * kPanelColumns.
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t offset(std::int64_t row, std::int64_t panel) const {
    // sum over earlier panels p of (columns + kSpareRows - p kPanelColumns) rows
    const std::int64_t earlier = panel * (columns + kSpareRows) - kPanelColumns * (panel * (panel - 1) / 2);
    return (earlier + row - panel * kPanelColumns) * kPanelColumns;
  }

  /// Elements in all.
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t size() const {
    return offset(panels() * kPanelColumns, panels());
  }
};

/// Where all of a symmetric matrix H [K, K] lies: in panels of kPanelColumns columns, one after the other, each row by
/// row. H[i, j] is element offset(i, j / kPanelColumns) + j % kPanelColumns. Columns past the last are 0.
struct SymmetricLayout {
  std::int64_t columns;  ///< K

  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t panels() const { return panel_count(columns); }

  /// The first element of `row` in a panel.
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t offset(std::int64_t row, std::int64_t panel) const {
    return (panel * columns + row) * kPanelColumns;
  }

  /// Elements in all.
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t size() const { return offset(0, panels()); }

  /// Columns of a matrix [N, K] that is read by whole panels.
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t padded_columns() const {
    return panels() * kPanelColumns;
  }
};

}  // namespace miniquant::kernels
