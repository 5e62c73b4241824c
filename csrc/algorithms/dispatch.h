#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "algorithms/large_pages.h"
#include "algorithms/parallel.h"
#include "kernels/arithmetic.h"
#include "kernels/kernels.h"

// How the algorithms reach the kernels: by element type, over tiles of rows, with aligned scratch memory.

namespace miniquant::algorithms {

/// The chosen instruction set's kernels for T.
template <typename T>
const kernels::TypedKernels<T>& typed_kernels() {
  return kernels::typed_kernels<T>(kernels::kernels());
}

/// body.operator()<float>() or <double>(), for a compute dtype.
template <typename Body>
void dispatch_compute(at::ScalarType dtype, const Body& body) {
  if (dtype == at::kDouble) {
    body.template operator()<double>();
  } else {
    TORCH_INTERNAL_ASSERT(dtype == at::kFloat, "not a compute dtype: ", dtype);
    body.template operator()<float>();
  }
}

/// Rows in one piece of work: `most_tiles`, or fewer where threads would otherwise get less than four pieces each, so
/// all threads end at about the same time. Kernels treat rows independently: the number of rows changes only the time
/// taken.
inline int64_t rows_per_piece(int64_t rows, int64_t tile_rows, int64_t most_tiles = kernels::kTilesPerPass) {
  constexpr int64_t kMinPiecesPerThread = 4;
  const int64_t tiles = kernels::ceil_div(rows, tile_rows);
  const int64_t share = kernels::ceil_div(tiles, kMinPiecesPerThread * at::get_num_threads());
  return tile_rows * std::clamp<int64_t>(share, 1, most_tiles);
}

/// body(row_begin, row_end) for pieces of `rows` that begin at multiples of `tile_rows`, in parallel. `operations`:
/// approximate multiply-adds per row.
template <typename Body>
void for_row_tiles(int64_t rows, int64_t tile_rows, int64_t operations, const Body& body) {
  const int64_t piece_rows = rows_per_piece(rows, tile_rows);
  for_pieces(kernels::ceil_div(rows, piece_rows), rows * operations,
             [&](int64_t piece) { body(piece * piece_rows, std::min(rows, (piece + 1) * piece_rows)); });
}

/// kernel(problem, row_begin, row_end, workspace) for pieces of `rows`, in parallel. Each thread has its own workspace,
/// of workspace_of(problem, rows per piece) elements T. `operations`: approximate multiply-adds per row. `most_tiles`:
/// in a piece.
template <typename T, typename Problem, typename Kernel>
void run_on_rows(int64_t rows, int64_t operations, const Problem& problem,
                 int64_t (*workspace_of)(const Problem& problem, int64_t rows), const Kernel& kernel,
                 int64_t most_tiles = kernels::kTilesPerPass) {
  const int64_t piece_rows = rows_per_piece(rows, typed_kernels<T>().tile_rows, most_tiles);
  const int64_t count = kernels::ceil_div(rows, piece_rows);
  Team team(team_size(count, rows * operations));
  Pieces pieces(count);
  team.run([&] {
    at::Tensor workspace;
    team.take(pieces, [&](int64_t piece) {
      if (!workspace.defined()) {
        workspace =
            empty_in_large_pages(workspace_of(problem, std::min(rows, piece_rows)), c10::CppTypeToScalarType<T>::value);
      }
      kernel(problem, piece * piece_rows, std::min(rows, (piece + 1) * piece_rows), workspace.mutable_data_ptr<T>());
    });
  });
}

/// body(index) for 0 <= index < count, in parallel, the last index first; for work that grows with the index.
/// `operations`: approximate multiply-adds in all.
template <typename Body>
void for_triangle(int64_t count, int64_t operations, const Body& body) {
  for_pieces(count, operations, [&](int64_t piece) { body(count - 1 - piece); });
}

}  // namespace miniquant::algorithms
