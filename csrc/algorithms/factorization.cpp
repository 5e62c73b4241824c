#include "algorithms/factorization.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

#include "algorithms/dispatch.h"

namespace miniquant::algorithms {
namespace {

/// Rows per step: long enough for the trailing update to be limited by arithmetic, not by memory.
constexpr int64_t kBlockRows = 128;

}  // namespace

bool factor_from_last_row(const at::Tensor& matrix) {
  const auto& kernel = typed_kernels<double>();
  const int64_t columns = matrix.size(0);
  double* const a = matrix.mutable_data_ptr<double>();
  const int64_t all_tiles = (columns + kernel.tile_rows - 1) / kernel.tile_rows;
  const at::Tensor block = at::empty({kBlockRows, kBlockRows}, matrix.options());
  const at::Tensor packed = at::empty({all_tiles, kBlockRows, kernel.tile_rows}, matrix.options());
  double* const l = block.mutable_data_ptr<double>();
  double* const tiles = packed.mutable_data_ptr<double>();

  for (int64_t end = columns; end > 0;) {
    const int64_t begin = std::max<int64_t>(0, end - kBlockRows);
    const int64_t rows = end - begin;

    // A[block, block] = L^T L, on a copy whose rows lie close together
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(a + (begin + row) * columns + begin, rows, l + row * rows);
    }
    if (kernel.factor_block(l, rows, rows) >= 0) {
      return false;
    }
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(l + row * rows, row + 1, a + (begin + row) * columns + begin);
    }

    // L[block, :begin] = L[block, block]^-T A[block, :begin]
    const int64_t left_tiles = (begin + kernel.tile_rows - 1) / kernel.tile_rows;
    at::parallel_for(0, left_tiles, 1, [&](int64_t tile_begin, int64_t tile_end) {
      for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        kernel.solve_tile(l, rows, rows, a + begin * columns, columns, begin, tile,
                          tiles + tile * rows * kernel.tile_rows);
      }
    });

    // A[:begin, :begin] -= L[block, :begin]^T L[block, :begin]
    for_triangle(left_tiles, [&](int64_t tile) {
      kernel.rank_update(a, columns, begin, tiles, rows, 0, tile + 1, tile, -1.0, /*mirror=*/false);
    });
    end = begin;
  }
  return true;
}

}  // namespace miniquant::algorithms
