#include "algorithms/symmetric.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "algorithms/dispatch.h"
#include "algorithms/large_pages.h"

namespace miniquant::algorithms {
namespace {

/// The cost of a pass for each entry of H, in multiply-adds: high, because the pass moves memory.
constexpr int64_t kOperationsPerEntry = 32;

/// Rows and columns of a square that a kernel reads at a time.
constexpr int64_t kSide = kernels::kPanelColumns;

/// body(row, panel) for the squares of the lower triangle, in parallel over rows of squares.
template <typename Body>
void for_lower_squares(int64_t columns, const Body& body) {
  for_triangle(kernels::ceil_div(columns, kSide), kOperationsPerEntry * columns * columns, [&](int64_t row) {
    for (int64_t panel = 0; panel <= row; ++panel) {
      body(row, panel);
    }
  });
}

/// An entry of H times a power of two, in the wider of the two types: float64 may hold what float32 cannot.
template <typename T, typename From>
T scaled(From entry, double factor) {
  using Wider = std::common_type_t<T, From>;
  return static_cast<T>(static_cast<Wider>(entry) * static_cast<Wider>(factor));
}

/// average[i][j] = factor (H + H^T) / 2 in the square of a row of squares and a panel.
template <typename From, typename T>
void average_square(const From* h, int64_t columns, int64_t row, int64_t panel, double factor, T* average) {
  if constexpr (std::is_same_v<T, float>) {
    typed_kernels<From>().average_square_as_f32(h, columns, row * kSide, panel * kSide, factor, average);
  } else {
    typed_kernels<From>().average_square_as_f64(h, columns, row * kSide, panel * kSide, factor, average);
  }
}

/// Sets a row of squares of the lower triangle of factor (H + H^T) / 2.
template <typename From, typename T>
void average_row(const From* h, double factor, kernels::TriangleLayout layout, int64_t row, T* out) {
  for (int64_t panel = 0; panel <= row; ++panel) {
    average_square(h, layout.columns, row, panel, factor, out + layout.offset(row * kSide, panel));
  }
}

/// Sets factor (H + H^T) / 2.
template <typename From, typename T>
void average_all(const From* h, double factor, kernels::SymmetricLayout layout, T* out) {
  for_lower_squares(layout.columns, [&](int64_t row, int64_t panel) {
    T* const lower = out + layout.offset(row * kSide, panel);
    average_square(h, layout.columns, row, panel, factor, lower);
    if (row == panel) {
      return;
    }
    // A square below the diagonal is kSide wide.
    const int64_t rows = std::min(kSide, layout.columns - row * kSide);
    T* const upper = out + layout.offset(panel * kSide, row);
    typed_kernels<T>().transpose(lower, kSide, rows, kSide, upper, kSide);
    for (int64_t j = 0; j < kSide; ++j) {
      std::fill(upper + j * kSide + rows, upper + (j + 1) * kSide, T(0));
    }
  });
}

/// The lower triangle with rows and columns in the order `column`. Each of the two passes reads whole rows of H, so the
/// entries that it picks come from the cache.
template <typename From, typename T>
void average_in_order(const From* h, double factor, kernels::TriangleLayout layout, const int64_t* column, T* out) {
  const int64_t columns = layout.columns;
  for_lower_squares(columns, [&](int64_t square, int64_t panel) {
    const int64_t width = std::min(kSide, columns - panel * kSide);
    for (int64_t i = square * kSide; i < std::min(columns, (square + 1) * kSide); ++i) {
      const From* const row = h + column[i] * columns;
      T* const to = out + layout.offset(i, panel);
      for (int64_t j = 0; j < width; ++j) {
        to[j] = scaled<T>(row[column[panel * kSide + j]], factor);
      }
    }
  });
  for_pieces(layout.panels(), kOperationsPerEntry * columns * columns, [&](int64_t panel) {
    for (int64_t j = panel * kSide; j < std::min(columns, (panel + 1) * kSide); ++j) {
      const From* const row = h + column[j] * columns;
      T* const to = out + layout.offset(panel * kSide, panel) + j % kSide;
      for (int64_t i = panel * kSide; i < columns; ++i) {
        T& entry = to[(i - panel * kSide) * kSide];
        entry = (entry + scaled<T>(row[column[i]], factor)) / 2;
      }
    }
  });
}

/// Sets rows [row_begin, row_end) of the diagonal of a triangle.
template <typename T>
void set_diagonal(kernels::TriangleLayout layout, const T* diagonal, int64_t row_begin, int64_t row_end, T* triangle) {
  for (int64_t i = row_begin; i < row_end; ++i) {
    triangle[layout.offset(i, i / kSide) + i % kSide] = diagonal[i];
  }
}

/// A triangle that is not set but for its spare rows.
at::Tensor room_for_triangle(int64_t columns, at::ScalarType dtype) {
  const kernels::TriangleLayout layout{columns};
  at::Tensor triangle = empty_in_large_pages(layout.size(), dtype);
  dispatch_compute(dtype, [&]<typename T> {
    T* const out = triangle.mutable_data_ptr<T>();
    // Set to 0, because the kernels read these rows with the last strip, though without effect.
    for (int64_t panel = 0; panel < layout.panels(); ++panel) {
      std::fill(out + layout.offset(columns, panel), out + layout.offset(columns + kernels::kSpareRows, panel), T(0));
    }
  });
  return triangle;
}

}  // namespace

at::Tensor lower_triangle(const at::Tensor& hessian, double factor, at::ScalarType dtype, const at::Tensor& column) {
  const int64_t columns = hessian.size(0);
  const kernels::TriangleLayout layout{columns};
  const at::Tensor h = hessian.contiguous();
  at::Tensor triangle = room_for_triangle(columns, dtype);
  dispatch_compute(h.scalar_type(), [&]<typename From> {
    dispatch_compute(dtype, [&]<typename T> {
      const From* const from = h.const_data_ptr<From>();
      T* const out = triangle.mutable_data_ptr<T>();
      if (column.defined()) {
        average_in_order(from, factor, layout, column.const_data_ptr<int64_t>(), out);
      } else {
        for_triangle(layout.panels(), kOperationsPerEntry * columns * columns,
                     [&](int64_t row) { average_row(from, factor, layout, row, out); });
      }
    });
  });
  return triangle;
}

LowerTriangleRows::LowerTriangleRows(const at::Tensor& hessian, double factor, at::ScalarType dtype,
                                     at::Tensor diagonal)
    : hessian_(hessian.contiguous()),
      factor_(factor),
      diagonal_(std::move(diagonal)),
      triangle_(room_for_triangle(hessian.size(0), dtype)) {}

void LowerTriangleRows::set(int64_t panel) const {
  const kernels::TriangleLayout layout{hessian_.size(0)};
  dispatch_compute(hessian_.scalar_type(), [&]<typename From> {
    dispatch_compute(triangle_.scalar_type(), [&]<typename T> {
      T* const out = triangle_.mutable_data_ptr<T>();
      average_row(hessian_.const_data_ptr<From>(), factor_, layout, panel, out);
      set_diagonal(layout, diagonal_.const_data_ptr<T>(), panel * kSide, std::min(layout.columns, (panel + 1) * kSide),
                   out);
    });
  });
}

at::Tensor symmetric_panels(const at::Tensor& hessian, double factor, at::ScalarType dtype) {
  const kernels::SymmetricLayout layout{hessian.size(0)};
  const at::Tensor h = hessian.contiguous();
  const at::Tensor panels = empty_in_large_pages(layout.size(), dtype);
  panels.slice(0, layout.offset(0, layout.panels())).zero_();  // the spare elements
  dispatch_compute(h.scalar_type(), [&]<typename From> {
    dispatch_compute(dtype, [&]<typename T> {
      average_all(h.const_data_ptr<From>(), factor, layout, panels.mutable_data_ptr<T>());
    });
  });
  return panels;
}

void add_to_diagonal_of_panels(at::Tensor& panels, int64_t columns, double added) {
  const kernels::SymmetricLayout layout{columns};
  dispatch_compute(panels.scalar_type(), [&]<typename T> {
    T* const out = panels.mutable_data_ptr<T>();
    for (int64_t j = 0; j < columns; ++j) {
      out[layout.offset(j, j / kSide) + j % kSide] += static_cast<T>(added);
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
      to[i] = from[layout.offset(i, i / kSide) + i % kSide];
    }
  });
  return diagonal;
}

void set_diagonal_of_triangle(const at::Tensor& triangle, const at::Tensor& diagonal) {
  const int64_t columns = diagonal.size(0);
  dispatch_compute(triangle.scalar_type(), [&]<typename T> {
    set_diagonal(kernels::TriangleLayout{columns}, diagonal.const_data_ptr<T>(), 0, columns,
                 triangle.mutable_data_ptr<T>());
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
  SymmetrySurvey survey;
  dispatch_compute(h.scalar_type(), [&]<typename T> {
    std::vector<kernels::SymmetryFigures<T>> rows(kernels::ceil_div(columns, kSide));
    for_triangle(static_cast<int64_t>(rows.size()), kOperationsPerEntryRead * columns * columns, [&](int64_t row) {
      rows[row] = typed_kernels<T>().survey_symmetry(h.const_data_ptr<T>(), columns, row * kSide);
    });
    for (const kernels::SymmetryFigures<T>& row : rows) {
      survey.finite = survey.finite && row.finite;
      survey.largest = std::max(survey.largest, static_cast<double>(row.largest));
      survey.largest_asymmetry = std::max(survey.largest_asymmetry, static_cast<double>(row.largest_asymmetry));
    }
  });
  return survey;
}

}  // namespace miniquant::algorithms
