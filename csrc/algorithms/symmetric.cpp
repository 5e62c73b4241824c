#include "algorithms/symmetric.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "algorithms/dispatch.h"

namespace miniquant::algorithms {
namespace {

/// The cost of a pass for each entry of H, in multiply-adds: high, because the pass moves memory.
constexpr int64_t kOperationsPerEntry = 32;

/// Rows and columns per tile of the passes below.
constexpr int64_t kTile = kernels::kPanelColumns;

/// body(row_begin, panel) for the tiles of the lower triangle, in parallel over rows of tiles.
template <typename Body>
void for_lower_tiles(int64_t columns, const Body& body) {
  for_triangle(kernels::ceil_div(columns, kTile), kOperationsPerEntry * columns * columns, [&](int64_t tile) {
    for (int64_t panel = 0; panel <= tile; ++panel) {
      body(tile * kTile, panel);
    }
  });
}

/// A tile of H and the same tile of H^T, rows from i_begin and columns from j_begin on. The tile of the other triangle
/// is copied first: while it is read column by column, rows a power of two apart evict one another from the cache.
template <typename T>
class TilePair {
 public:
  TilePair(const T* h, int64_t columns, int64_t i_begin, int64_t j_begin)
      : rows(std::min(kTile, columns - i_begin)), width(std::min(kTile, columns - j_begin)) {
    if (width < kTile) {
      lower.fill(T(0));
      upper.fill(T(0));
    }
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(h + (i_begin + i) * columns + j_begin, width, lower.data() + i * kTile);
    }
    for (int64_t j = 0; j < width; ++j) {
      const T* const from = h + (j_begin + j) * columns + i_begin;
      for (int64_t i = 0; i < rows; ++i) {
        upper[i * kTile + j] = from[i];
      }
    }
  }

  int64_t rows;
  int64_t width;
  std::array<T, kTile * kTile> lower;  ///< [rows][j] of H; 0 from column `width` on
  std::array<T, kTile * kTile> upper;  ///< [rows][j] of H^T
};

/// An entry of H times a power of two, in the wider of the two types: float64 may hold what float32 cannot.
template <typename T, typename From>
T scaled(From entry, double factor) {
  using Wider = std::common_type_t<T, From>;
  return static_cast<T>(static_cast<Wider>(entry) * static_cast<Wider>(factor));
}

/// to[i][j] = factor (H + H^T) / 2 for the rows of the pair; 0 from column `width` on.
template <typename From, typename T>
void average_tile(const TilePair<From>& pair, double factor, T* to) {
  for (int64_t i = 0; i < pair.rows * kTile; ++i) {
    to[i] = (scaled<T>(pair.lower[i], factor) + scaled<T>(pair.upper[i], factor)) / 2;
  }
}

/// Sets the lower triangle of factor (H + H^T) / 2.
template <typename From, typename T>
void average_triangles(const From* h, double factor, kernels::TriangleLayout layout, T* out) {
  for_lower_tiles(layout.columns, [&](int64_t i_begin, int64_t panel) {
    const TilePair<From> pair(h, layout.columns, i_begin, panel * kTile);
    average_tile(pair, factor, out + layout.offset(i_begin, panel));
  });
}

/// Sets factor (H + H^T) / 2.
template <typename From, typename T>
void average_triangles(const From* h, double factor, kernels::SymmetricLayout layout, T* out) {
  for_lower_tiles(layout.columns, [&](int64_t i_begin, int64_t panel) {
    const TilePair<From> pair(h, layout.columns, i_begin, panel * kTile);
    T* const lower = out + layout.offset(i_begin, panel);
    T* const upper = out + layout.offset(panel * kTile, i_begin / kTile);
    average_tile(pair, factor, lower);
    for (int64_t j = 0; j < pair.width; ++j) {
      for (int64_t i = 0; i < kTile; ++i) {
        upper[j * kTile + i] = i < pair.rows ? lower[i * kTile + j] : T(0);
      }
    }
  });
}

/// The lower triangle with rows and columns in the order `column`. Each of the two passes reads whole rows of H, so the
/// entries that it picks come from the cache.
template <typename From, typename T>
void average_triangles(const From* h, double factor, kernels::TriangleLayout layout, const int64_t* column, T* out) {
  const int64_t columns = layout.columns;
  for_lower_tiles(columns, [&](int64_t i_begin, int64_t panel) {
    const int64_t width = std::min(kTile, columns - panel * kTile);
    for (int64_t i = i_begin; i < std::min(columns, i_begin + kTile); ++i) {
      const From* const row = h + column[i] * columns;
      T* const to = out + layout.offset(i, panel);
      for (int64_t j = 0; j < width; ++j) {
        to[j] = scaled<T>(row[column[panel * kTile + j]], factor);
      }
    }
  });
  for_pieces(layout.panels(), kOperationsPerEntry * columns * columns, [&](int64_t panel) {
    for (int64_t j = panel * kTile; j < std::min(columns, (panel + 1) * kTile); ++j) {
      const From* const row = h + column[j] * columns;
      T* const to = out + layout.offset(panel * kTile, panel) + j % kTile;
      for (int64_t i = panel * kTile; i < columns; ++i) {
        T& entry = to[(i - panel * kTile) * kTile];
        entry = (entry + scaled<T>(row[column[i]], factor)) / 2;
      }
    }
  });
}

/// survey_symmetry() of one row of tiles. One accumulator for each column of a tile, so the loops are vectorized.
template <typename T>
class RowOfTiles {
 public:
  void add(const TilePair<T>& pair) {
    for (int64_t i = 0; i < pair.rows; ++i) {
      const T* const lower = pair.lower.data() + i * kTile;
      const T* const upper = pair.upper.data() + i * kTile;
      for (int64_t j = 0; j < kTile; ++j) {
        const T a = std::abs(lower[j]);
        const T b = std::abs(upper[j]);
        const T difference = std::abs(lower[j] - upper[j]);
        largest_[j] = a > largest_[j] ? a : largest_[j];
        largest_[j] = b > largest_[j] ? b : largest_[j];
        asymmetry_[j] = difference > asymmetry_[j] ? difference : asymmetry_[j];
        not_finite_[j] += T(0) * (a + b);  // NaN unless both are finite
      }
    }
  }

  [[nodiscard]] SymmetrySurvey survey() const {
    SymmetrySurvey survey;
    for (int64_t j = 0; j < kTile; ++j) {
      survey.finite = survey.finite && not_finite_[j] == T(0);
      survey.largest = std::max(survey.largest, static_cast<double>(largest_[j]));
      survey.largest_asymmetry = std::max(survey.largest_asymmetry, static_cast<double>(asymmetry_[j]));
    }
    return survey;
  }

 private:
  std::array<T, kTile> largest_{};
  std::array<T, kTile> asymmetry_{};
  std::array<T, kTile> not_finite_{};
};

}  // namespace

at::Tensor lower_triangle(const at::Tensor& hessian, double factor, at::ScalarType dtype, const at::Tensor& column) {
  const int64_t columns = hessian.size(0);
  const kernels::TriangleLayout layout{columns};
  const at::Tensor h = hessian.contiguous();
  const at::Tensor triangle = at::empty({layout.size()}, h.options().dtype(dtype));
  dispatch_compute(h.scalar_type(), [&]<typename From> {
    dispatch_compute(dtype, [&]<typename T> {
      const From* const from = h.const_data_ptr<From>();
      T* const out = triangle.mutable_data_ptr<T>();
      if (column.defined()) {
        average_triangles(from, factor, layout, column.const_data_ptr<int64_t>(), out);
      } else {
        average_triangles(from, factor, layout, out);
      }
      // Set to 0, because the kernels read these rows with the last strip, though without effect.
      for (int64_t panel = 0; panel < layout.panels(); ++panel) {
        std::fill(out + layout.offset(columns, panel), out + layout.offset(columns + kernels::kSpareRows, panel), T(0));
      }
    });
  });
  return triangle;
}

at::Tensor symmetric_panels(const at::Tensor& hessian, double factor, at::ScalarType dtype) {
  const kernels::SymmetricLayout layout{hessian.size(0)};
  const at::Tensor h = hessian.contiguous();
  const at::Tensor panels = at::empty({layout.size()}, h.options().dtype(dtype));
  dispatch_compute(h.scalar_type(), [&]<typename From> {
    dispatch_compute(dtype, [&]<typename T> {
      average_triangles(h.const_data_ptr<From>(), factor, layout, panels.mutable_data_ptr<T>());
    });
  });
  return panels;
}

void add_to_diagonal_of_panels(at::Tensor& panels, int64_t columns, double added) {
  const kernels::SymmetricLayout layout{columns};
  dispatch_compute(panels.scalar_type(), [&]<typename T> {
    T* const out = panels.mutable_data_ptr<T>();
    for (int64_t j = 0; j < columns; ++j) {
      out[layout.offset(j, j / kTile) + j % kTile] += static_cast<T>(added);
    }
  });
}

at::Tensor diagonal_of_triangle(const at::Tensor& triangle, int64_t columns) {
  const kernels::TriangleLayout layout{columns};
  const at::Tensor diagonal = at::empty({columns}, triangle.options());
  dispatch_compute(triangle.scalar_type(), [&]<typename T> {
    const T* const from = triangle.const_data_ptr<T>();
    T* const to = diagonal.mutable_data_ptr<T>();
    for (int64_t i = 0; i < columns; ++i) {
      to[i] = from[layout.offset(i, i / kTile) + i % kTile];
    }
  });
  return diagonal;
}

void set_diagonal_of_triangle(const at::Tensor& triangle, const at::Tensor& diagonal) {
  const int64_t columns = diagonal.size(0);
  const kernels::TriangleLayout layout{columns};
  dispatch_compute(triangle.scalar_type(), [&]<typename T> {
    const T* const from = diagonal.const_data_ptr<T>();
    T* const to = triangle.mutable_data_ptr<T>();
    for (int64_t i = 0; i < columns; ++i) {
      to[layout.offset(i, i / kTile) + i % kTile] = from[i];
    }
  });
}

SymmetrySurvey survey_symmetry(const at::Tensor& hessian) {
  const int64_t columns = hessian.size(0);
  if (columns == 0) {
    return {};
  }
  if (!hessian.is_cpu()) {
    return {at::isfinite(hessian).all().item<bool>(), hessian.abs().max().item<double>(),
            (hessian - hessian.mT()).abs().max().item<double>()};
  }
  const at::Tensor h = hessian.contiguous();
  std::vector<SymmetrySurvey> of_row(kernels::ceil_div(columns, kTile));
  dispatch_compute(h.scalar_type(), [&]<typename T> {
    for_triangle(static_cast<int64_t>(of_row.size()), kOperationsPerEntry * columns * columns, [&](int64_t tile) {
      RowOfTiles<T> row;
      for (int64_t panel = 0; panel <= tile; ++panel) {
        row.add(TilePair<T>(h.const_data_ptr<T>(), columns, tile * kTile, panel * kTile));
      }
      of_row[tile] = row.survey();
    });
  });
  SymmetrySurvey survey;
  for (const SymmetrySurvey& row : of_row) {
    survey.finite = survey.finite && row.finite;
    survey.largest = std::max(survey.largest, row.largest);
    survey.largest_asymmetry = std::max(survey.largest_asymmetry, row.largest_asymmetry);
  }
  return survey;
}

}  // namespace miniquant::algorithms
