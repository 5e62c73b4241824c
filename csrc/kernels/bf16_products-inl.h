#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/bf16.h"
#include "kernels/bf16_sums-inl.h"
#include "kernels/short_vector-inl.h"
#include "kernels/target-inl.h"
#include "kernels/transpose-inl.h"
#include MINIQUANT_BF16_HEADER

// S += sum of left^T right, one square of S at a time: sums of tiles in a workspace, then the addition to S, to both
// triangles of a symmetric one. Bf16Multiplier, in the unit's file, adds the products of 2 x 2 tiles:
//   begin(sums, fresh)   begins sums that are added to `sums`, or set them where `fresh`
//   add(operands, products, count, sums)
//                        sums[j][i] += sum over the products and the tokens t of the blocks left[j][t] right[t][i]
//   end(sums, fresh)     `sums` has them all
// Its constructor and destructor set up and release the unit, which other code on this thread uses too.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// The panels of one square, and the sums of its tiles.
struct SquareView {
  std::int64_t j_begin;
  std::int64_t j_end;
  std::int64_t i_begin;
  std::int64_t i_end;
  Bf16Sums sums;
  bool mirrored;  ///< nothing above the diagonal is needed

  /// The first j panel that column i of panels needs.
  [[nodiscard]] MINIQUANT_INLINE std::int64_t j_begin_of(std::int64_t i) const {
    return mirrored && i > j_begin ? i : j_begin;
  }
  /// The first i panel past those that row j of panels needs.
  [[nodiscard]] MINIQUANT_INLINE std::int64_t i_end_of(std::int64_t j) const {
    return mirrored ? min_of(i_end, j + 1) : i_end;
  }
  [[nodiscard]] MINIQUANT_INLINE float* tile(std::int64_t j, std::int64_t i) const {
    return sums.tile(j - j_begin, i - i_begin);
  }
};

/// Sums over the tokens of one run.
MINIQUANT_INLINE void add_run(const Bf16Problem& problem, const SquareView& square, std::int64_t block,
                              Bf16Multiplier& multiplier) {
  const Bf16Layout left = problem.left_layout;
  const Bf16Layout right = problem.right_layout;
  const std::int64_t blocks = left.run_blocks(block);
  for (std::int64_t i = square.i_begin; i < square.i_end; i += 2) {
    const std::int64_t first = square.j_begin_of(i);
    for (std::int64_t j = first; j < square.j_end; j += 2) {
      const std::int64_t next = j + 2 < square.j_end ? j + 2 : first;
      const Bf16Sums sums = {square.tile(j, i), square.sums.panels};
      multiplier.begin(sums, block == 0);
      const Bf16Operands operands = {
          .left = problem.left + left.offset(j, block),
          .right = problem.right + right.offset(i, block),
          .next_left = problem.left + left.offset(next, block),
          .panel_stride = blocks * kBf16TileElements,
          .left_part_stride = left.size(),
          .right_part_stride = right.size(),
          .blocks = blocks,
      };
      multiplier.add(operands, problem.products, problem.product_count, sums);
      multiplier.end(sums, block == 0);
    }
  }
}

/// sum[row, column] += tiles[column / kBf16Columns][row][column % kBf16Columns] for the rows of one panel and the
/// columns of `count` panels.
MINIQUANT_INLINE void add_strip(const Bf16Problem& problem, std::int64_t row_panel, std::int64_t column_panel,
                                std::int64_t count, const float* tiles) {
  using Sums = ShortVector<float, kBf16Columns>::unaligned;
  const std::int64_t rows = problem.left_layout.columns;
  const std::int64_t columns = problem.right_layout.columns;
  const std::int64_t row_begin = row_panel * kBf16Columns;
  const std::int64_t column_begin = column_panel * kBf16Columns;
  const std::int64_t width = min_of(columns - column_begin, count * kBf16Columns);
  const std::int64_t whole = width / kBf16Columns;
  for (std::int64_t r = 0; r < min_of(rows - row_begin, kBf16Columns); ++r) {
    float* const row = problem.sum + (row_begin + r) * columns + column_begin;
    const float* const sums = tiles + r * kBf16Columns;
    for (std::int64_t t = 0; t < whole; ++t) {
      *reinterpret_cast<Sums*>(row + t * kBf16Columns) += *reinterpret_cast<const Sums*>(sums + t * kSumTile);
    }
    for (std::int64_t c = whole * kBf16Columns; c < width; ++c) {
      row[c] += sums[whole * kSumTile + c % kBf16Columns];
    }
  }
}

/// The upper triangle of a tile on the diagonal = the lower.
MINIQUANT_INLINE void mirror(float* tile) {
  for (std::int64_t j = 0; j < kBf16Columns; ++j) {
    for (std::int64_t i = 0; i < j; ++i) {
      tile[i * kBf16Columns + j] = tile[j * kBf16Columns + i];
    }
  }
}

MINIQUANT_NOINLINE void add_sums(const Bf16Problem& problem, const SquareView& square) {
  for (std::int64_t j = square.j_begin; j < square.j_end; ++j) {
    if (square.mirrored && j < square.i_end) {
      mirror(square.tile(j, j));
    }
    add_strip(problem, j, square.i_begin, square.i_end_of(j) - square.i_begin, square.tile(j, square.i_begin));
  }
}

MINIQUANT_NOINLINE void add_upper(const Bf16Problem& problem, const SquareView& square) {
  alignas(64) float strip[Bf16Multiplier::kMostSquarePanels * kSumTile];
  for (std::int64_t i = square.i_begin; i < square.i_end; ++i) {
    const std::int64_t begin = i + 1 > square.j_begin ? i + 1 : square.j_begin;
    for (std::int64_t j = begin; j < square.j_end; ++j) {
      transpose(square.tile(j, i), kBf16Columns, kBf16Columns, kBf16Columns, strip + (j - begin) * kSumTile,
                kBf16Columns);
    }
    if (begin < square.j_end) {
      add_strip(problem, i, begin, square.j_end - begin, strip);
    }
  }
}

MINIQUANT_NOINLINE void sum_square(const Bf16Problem& problem, const SquareView& square) {
  Bf16Multiplier multiplier;
  for (std::int64_t block = 0; block < problem.left_layout.blocks(); block += kBf16RunBlocks) {
    add_run(problem, square, block, multiplier);
  }
}

MINIQUANT_INLINE SquareView square_at(const Bf16Problem& problem, std::int64_t j, std::int64_t i, float* workspace,
                                      bool mirrored) {
  const std::int64_t side = problem.square_panels;
  return {.j_begin = j * side,
          .j_end = min_of((j + 1) * side, problem.left_layout.panels()),
          .i_begin = i * side,
          .i_end = min_of((i + 1) * side, problem.right_layout.panels()),
          .sums = {workspace, side},
          .mirrored = mirrored};
}

[[maybe_unused]] void add_square(const Bf16Problem& problem, std::int64_t j, std::int64_t i, float* workspace) {
  const SquareView square = square_at(problem, j, i, workspace, /*mirrored=*/false);
  sum_square(problem, square);
  add_sums(problem, square);
}

[[maybe_unused]] void add_mirrored(const Bf16Problem& problem, std::int64_t j, std::int64_t i, float* workspace) {
  const SquareView square = square_at(problem, j, i, workspace, /*mirrored=*/true);
  sum_square(problem, square);
  add_sums(problem, square);
  add_upper(problem, square);
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
