#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/kernels.h"
#include "kernels/lanes-inl.h"
#include "kernels/microkernel-inl.h"
#include "kernels/triangle.h"

// e H e^T = sum_j e_j (2 sum_{i<j} e_i H_ij + H_jj e_j): half the products of e H, for one tile of rows at a time.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

template <typename T>
std::int64_t quadratic_form_workspace(const QuadraticFormProblem<T>& problem) {
  return kTileRows<T> * problem.triangle_layout.columns;
}

template <typename T>
void quadratic_form(const QuadraticFormProblem<T>& problem, std::int64_t row_begin, std::int64_t row_end,
                    T* workspace) {
  const TriangleLayout layout = problem.triangle_layout;
  T* const error = workspace;  // [K][lane]
  for (std::int64_t row = row_begin; row < row_end; row += kTileRows<T>) {
    const std::int64_t rows = min_of(row_end - row, kTileRows<T>);
    transpose_into_tile(problem.error + row * layout.columns, layout.columns, rows, layout.columns, error);
    Vector<T> form[kVectorsPerTile] = {};
    for (std::int64_t first = 0; first < layout.columns; first += kStripColumns) {
      TileAccumulator<T> sum;
      clear(sum);
      FetchLaterRows next_strip = {kStripColumns * kPanelColumns * static_cast<std::int64_t>(sizeof(T))};
      accumulate_rows_of(problem.triangle, layout, first, 0, first, error, sum, next_strip);
#pragma GCC unroll 8
      for (std::int64_t c = 0; c < kStripColumns; ++c) {
        const std::int64_t j = first + c;
        if (j < layout.columns) {
          const T* const column = entry(problem.triangle, layout, j, j);
          Vector<T> lanes[kVectorsPerTile];
#pragma GCC unroll 8
          for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
            lanes[v] = load<T>(column_of<T>(error, j) + v * kLanes<T>);
            const Vector<T> diagonal = broadcast<T>(*column) * lanes[v];
            form[v] = multiply_add(lanes[v], sum.value[c][v] + sum.value[c][v] + diagonal, form[v]);
          }
          accumulate_term(sum, column - c * kPanelColumns, kPanelColumns, lanes, c + 1, kStripColumns);
        }
      }
    }
    T result[kTileRows<T>];
    for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
      store<T>(result + v * kLanes<T>, form[v]);
    }
    for (std::int64_t lane = 0; lane < rows; ++lane) {
      problem.form[row + lane] = result[lane];
    }
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
