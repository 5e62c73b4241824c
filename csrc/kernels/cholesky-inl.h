#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/fetch-inl.h"
#include "kernels/microkernel-inl.h"
#include "kernels/triangle.h"

// The steps of A = L^T L (L lower triangular), factored from the last row up, on blocks [rows][kPanelColumns] of the
// panels of a triangle.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

template <typename T>
void subtract_products(const T* left, const T* right, std::int64_t count, std::int64_t rows, T* block,
                       const Upcoming& upcoming) {
  Fetcher fetcher(upcoming);
  for (std::int64_t lane = 0; lane < kPanelColumns; lane += kTileRows<T>) {
    for (std::int64_t row = 0; row < rows; row += kStripColumns) {
      const std::int64_t width = min_of(rows - row, kStripColumns);
      TileAccumulator<T> sum;
      clear(sum);
      FetchLines lines = fetcher.take(count);
      accumulate(sum, left + row, {kPanelColumns, 1}, right + lane, kPanelColumns, count, lines);
      T* const to = block + row * kPanelColumns + lane;
      TileAccumulator<T> rest;
      load(rest, to, kPanelColumns, width);
      add(rest, sum, T(-1));
      store(rest, to, kPanelColumns, width);
    }
  }
}

/// Whole vectors are computed, and written past the diagonal too.
template <typename T>
std::int64_t factor_block(T* block, std::int64_t rows) {
  for (std::int64_t j = rows - 1; j >= 0; --j) {
    T* const row = block + j * kPanelColumns;
    if (!(row[j] > T(0))) {
      return j;
    }
    const T pivot = std::sqrt(row[j]);
    Vector<T> solved[kPanelColumns / kLanes<T>];
    for (std::int64_t i = 0; i < j; i += kLanes<T>) {
      solved[i / kLanes<T>] = load<T>(row + i) / pivot;
      store<T>(row + i, solved[i / kLanes<T>]);
    }
    row[j] = pivot;
    for (std::int64_t k = 0; k < j; ++k) {
      const T factor = row[k];
      T* const updated = block + k * kPanelColumns;
      for (std::int64_t i = 0; i <= k; i += kLanes<T>) {
        store<T>(updated + i, load<T>(updated + i) - factor * solved[i / kLanes<T>]);
      }
    }
  }
  return -1;
}

template <typename T>
void solve_block(const T* diagonal, std::int64_t rows, T* block) {
  // X_j = (A_j - sum_{k>j} L_kj X_k) / L_jj, terms in descending k
  const std::int64_t last = (rows - 1) / kStripColumns * kStripColumns;
  for (std::int64_t lane = 0; lane < kPanelColumns; lane += kTileRows<T>) {
    T* const x = block + lane;
    for (std::int64_t first = last; first >= 0; first -= kStripColumns) {
      const std::int64_t end = min_of(first + kStripColumns, rows);
      TileAccumulator<T> sum;
      clear(sum);
      accumulate(sum, diagonal + (rows - 1) * kPanelColumns + first, {-kPanelColumns, 1},
                 x + (rows - 1) * kPanelColumns, -kPanelColumns, rows - end);
#pragma GCC unroll 8
      for (std::int64_t c = kStripColumns - 1; c >= 0; --c) {
        const std::int64_t j = first + c;
        if (j < end) {
          const T* const l = diagonal + j * kPanelColumns;
          Vector<T> solved[kVectorsPerTile];
#pragma GCC unroll 8
          for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
            T* const at = x + j * kPanelColumns + v * kLanes<T>;
            solved[v] = (load<T>(at) - sum.value[c][v]) / l[j];
            store<T>(at, solved[v]);
          }
          accumulate_term(sum, l + first, 1, solved, 0, c);
        }
      }
    }
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
