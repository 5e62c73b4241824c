#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/fetch-inl.h"
#include "kernels/kernels.h"
#include "kernels/target-inl.h"
#include "kernels/transpose-inl.h"
#include "kernels/triangle.h"
#include "kernels/vector-inl.h"

// Passes over H and H^T, one square of kPanelColumns rows and columns at a time.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

constexpr std::int64_t kSquareElements = kPanelColumns * kPanelColumns;

MINIQUANT_INLINE float magnitude(float value) { return __builtin_fabsf(value); }
MINIQUANT_INLINE double magnitude(double value) { return __builtin_fabs(value); }

/// A square of H with rows from i_begin and columns from j_begin on, and the same square of H^T. Both are copied: while
/// H^T is read column by column, rows a power of two apart evict one another from the cache.
template <typename T>
struct SquarePair {
  alignas(kVectorBytes) T lower[kSquareElements];  ///< [rows][kPanelColumns] of H; 0 from the last column of H on
  alignas(kVectorBytes) T upper[kSquareElements];  ///< [rows][kPanelColumns] of H^T, likewise
  std::int64_t rows;

  /// Also fetches what is read next, where that is the square of the next columns.
  void read(const T* h, std::int64_t columns, std::int64_t i_begin, std::int64_t j_begin) {
    rows = min_of(columns - i_begin, kPanelColumns);
    const std::int64_t next = j_begin + kPanelColumns;
    fetch_rows(h + i_begin * columns + next, columns, 0, rows, kPanelColumns);
    fetch_rows(h + next * columns + i_begin, columns, 0, min_of(columns - next, kPanelColumns), kPanelColumns);
    const std::int64_t width = min_of(columns - j_begin, kPanelColumns);
    const T* const from = h + i_begin * columns + j_begin;
    for (std::int64_t i = 0; i < rows; ++i) {
      T* const lower_row = lower + i * kPanelColumns;
      T* const upper_row = upper + i * kPanelColumns;
      for (std::int64_t j = 0; j < width; ++j) {
        lower_row[j] = from[i * columns + j];
      }
      for (std::int64_t j = width; j < kPanelColumns; ++j) {
        lower_row[j] = T(0);
        upper_row[j] = T(0);
      }
    }
    transpose(h + j_begin * columns + i_begin, columns, width, rows, upper, kPanelColumns);
  }
};

template <typename T>
SymmetryFigures<T> survey_symmetry(const T* h, std::int64_t columns, std::int64_t row_begin) {
  // One of each for every column of a square, so the loops are vectorized.
  alignas(kVectorBytes) T largest[kPanelColumns] = {};
  alignas(kVectorBytes) T asymmetry[kPanelColumns] = {};
  alignas(kVectorBytes) T not_finite[kPanelColumns] = {};
  SquarePair<T> pair;
  for (std::int64_t column = 0; column <= row_begin; column += kPanelColumns) {
    pair.read(h, columns, row_begin, column);
    for (std::int64_t i = 0; i < pair.rows; ++i) {
      for (std::int64_t j = 0; j < kPanelColumns; ++j) {
        const T lower = pair.lower[i * kPanelColumns + j];
        const T upper = pair.upper[i * kPanelColumns + j];
        const T a = magnitude(lower);
        const T b = magnitude(upper);
        const T difference = magnitude(lower - upper);
        largest[j] = a > largest[j] ? a : largest[j];
        largest[j] = b > largest[j] ? b : largest[j];
        asymmetry[j] = difference > asymmetry[j] ? difference : asymmetry[j];
        not_finite[j] += T(0) * (a + b);  // NaN unless both are finite
      }
    }
  }
  SymmetryFigures<T> figures = {true, T(0), T(0)};
  for (std::int64_t j = 0; j < kPanelColumns; ++j) {
    figures.finite = figures.finite && not_finite[j] == T(0);
    figures.largest = largest[j] > figures.largest ? largest[j] : figures.largest;
    figures.largest_asymmetry = asymmetry[j] > figures.largest_asymmetry ? asymmetry[j] : figures.largest_asymmetry;
  }
  return figures;
}

/// The wider of two element types.
template <typename T, typename Other>
using WiderOf = decltype(T() + Other());

template <typename T, typename To>
void average_square(const T* h, std::int64_t columns, std::int64_t i_begin, std::int64_t j_begin, double factor,
                    To* average) {
  using Wide = WiderOf<T, To>;
  const Wide wide_factor = static_cast<Wide>(factor);
  SquarePair<T> pair;
  pair.read(h, columns, i_begin, j_begin);
  for (std::int64_t i = 0; i < pair.rows * kPanelColumns; ++i) {
    const To lower = static_cast<To>(static_cast<Wide>(pair.lower[i]) * wide_factor);
    const To upper = static_cast<To>(static_cast<Wide>(pair.upper[i]) * wide_factor);
    average[i] = (lower + upper) / 2;
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
