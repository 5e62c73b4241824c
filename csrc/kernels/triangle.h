#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"

namespace miniquant::kernels {

/// Columns per panel of a triangle: a multiple of the tile of every kernel.
inline constexpr std::int64_t kPanelColumns = 48;

/// Max rows past the last one that a kernel reads: a strip of columns is read whole, also at the end.
inline constexpr std::int64_t kSpareRows = 7;

/// The number of panels that hold `columns` columns.
[[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t panel_count(std::int64_t columns) {
  return ceil_div(columns, kPanelColumns);
}

/// Layout of a lower triangle L [K, K]: panels of kPanelColumns columns, one after the other, each row by row from the
/// panel's first row of the triangle on. L[j, i] is element offset(j, i / kPanelColumns) + i % kPanelColumns. Elements
/// above the diagonal, or past the last row or column, are padding.
struct TriangleLayout {
  std::int64_t columns;  ///< K

  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t panels() const { return panel_count(columns); }

  /// The first element of `row` in a panel that holds it: row >= panel * kPanelColumns.
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t offset(std::int64_t row, std::int64_t panel) const {
    // sum over earlier panels p of (columns + kSpareRows - p kPanelColumns) rows
    const std::int64_t earlier = panel * (columns + kSpareRows) - kPanelColumns * (panel * (panel - 1) / 2);
    return (earlier + row - panel * kPanelColumns) * kPanelColumns;
  }

  /// The number of elements.
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t size() const {
    return offset(panels() * kPanelColumns, panels());
  }
};

/// Layout of a whole symmetric matrix H [K, K]: panels of kPanelColumns columns, one after the other, each row by row.
/// H[i, j] is element offset(i, j / kPanelColumns) + j % kPanelColumns. Columns past the last are 0. After the last
/// panel come spare elements: a strip that begins within a panel is read whole.
struct SymmetricLayout {
  std::int64_t columns;  ///< K

  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t panels() const { return panel_count(columns); }

  /// The first element of `row` in a panel.
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t offset(std::int64_t row, std::int64_t panel) const {
    return (panel * columns + row) * kPanelColumns;
  }

  /// The number of elements.
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t size() const {
    constexpr std::int64_t kSpareColumns = kSpareRows;
    return offset(0, panels()) + kSpareColumns;
  }

  /// Columns of a matrix [N, K] with its columns padded to whole panels.
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t padded_columns() const {
    return panels() * kPanelColumns;
  }
};

}  // namespace miniquant::kernels
