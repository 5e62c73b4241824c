#pragma once

#include <cstdint>

#include "kernels/instruction_set.h"

// The kernels: serial, reentrant, on raw pointers. Sizes are the caller's to check. Matrices are row-major and
// contiguous unless a leading dimension is given. N rows (out features), K columns (in features), G columns per group.
//
// Every result is a sum in a fixed order per element, so it does not depend on how the caller splits the work.

namespace miniquant::kernels {

/// The integers of a grid. `code_max` >= `code_min`; both within int8.
struct CodeRange {
  std::int32_t code_min;
  std::int32_t code_max;
  bool symmetric;
};

/// Rounds a scale to the precision in which it is stored (the weight's dtype), never to 0.
template <typename T>
using RoundScale = T (*)(T scale);

/// One group-quantized weight: where its parts are. `column_group[j]` is the group of column j.
template <typename T>
struct GridView {
  CodeRange range;
  std::int64_t group_size;
  std::int64_t groups;       ///< per row
  T* scales;                 ///< [N, groups]
  std::int8_t* zero_points;  ///< [N, groups]
  std::int8_t* codes;        ///< [N, K]
  RoundScale<T> round_scale;
};

/// A GPTQ sweep: docs/algorithm.md, "The form without an inverse". Step j of the sweep quantizes stored column
/// column[j].
template <typename T>
struct SweepProblem {
  std::int64_t columns;  ///< K
  const T* weight;       ///< [N, K]
  GridView<T> grid;
  bool dynamic_scales;         ///< scales are computed when a segment (one group) is reached, else read
  const std::int64_t* column;  ///< [K], stored column of each step
  const T* pivot_squared;      ///< [K], R_jj^2 by step
  const T* packed;             ///< the packed triangle C[i, j] = R_ij / R_jj
  const std::int64_t* block_begin;
  const std::int64_t* segment_begin;
  const std::int64_t* strip_begin;
  const std::int64_t* strip_offset;
  std::int64_t max_block_columns;
  T* row_loss;  ///< [N]
};

/// Per-row quadratic forms e H e^T over a packed triangle of H.
template <typename T>
struct QuadraticFormProblem {
  std::int64_t columns;  ///< K
  const T* error;        ///< [N, K]
  const T* packed;       ///< the packed triangle of H, the diagonal included
  const std::int64_t* strip_begin;
  const std::int64_t* strip_offset;
  std::int64_t strips;
  T* form;  ///< [N]
};

/// The kernels for one element type. A tile is `tile_rows` lanes wide; packed tiles are [K or B][tile_rows].
template <typename T>
struct TypedKernels {
  std::int64_t tile_rows;

  /// scales, zero_points = grid of weight [rows, K] (all of a row's groups), for rows [row_begin, row_end).
  void (*compute_grid)(const GridView<T>& grid, const T* weight, std::int64_t columns, std::int64_t row_begin,
                       std::int64_t row_end);

  /// codes = round(weight / scale) + zero_point, clamped, for rows [row_begin, row_end).
  void (*round_to_nearest)(const GridView<T>& grid, const T* weight, std::int64_t columns, std::int64_t row_begin,
                           std::int64_t row_end);

  /// Elements of workspace that `sweep` needs for `rows` rows.
  std::int64_t (*sweep_workspace)(const SweepProblem<T>& problem, std::int64_t rows);

  /// Quantizes rows [row_begin, row_end). `workspace` is aligned to 64 bytes.
  void (*sweep)(const SweepProblem<T>& problem, std::int64_t row_begin, std::int64_t row_end, T* workspace);

  /// Elements of workspace that `quadratic_form` needs.
  std::int64_t (*quadratic_form_workspace)(const QuadraticFormProblem<T>& problem);

  /// form = e H e^T for rows [row_begin, row_end). `workspace` is aligned to 64 bytes.
  void (*quadratic_form)(const QuadraticFormProblem<T>& problem, std::int64_t row_begin, std::int64_t row_end,
                         T* workspace);

  /// tiles[t][r][lane] = rows[r * ld + t * tile_rows + lane], 0 past `columns`, for tile t and r < count.
  void (*pack_tile)(const T* rows, std::int64_t ld, std::int64_t count, std::int64_t columns, std::int64_t tile,
                    T* tiles);

  /// A[j, i] += sign * sum_r rows[r, j] rows[r, i] for i in [tile i_begin, tile i_end), j in tile j_tile, i <= j; with
  /// `mirror` also A[i, j] for i < j. `tiles` holds the packed rows [r < count, columns]; A has leading dimension ld.
  void (*rank_update)(T* a, std::int64_t ld, std::int64_t columns, const T* tiles, std::int64_t count,
                      std::int64_t i_tile_begin, std::int64_t i_tile_end, std::int64_t j_tile, T sign, bool mirror);

  /// Factors the n x n block a = L^T L from its last row up (L lower triangular, in the lower triangle of a). Returns
  /// -1, or the row whose pivot is not positive.
  std::int64_t (*factor_block)(T* a, std::int64_t ld, std::int64_t n);

  /// With L the factored block `l` [n, n], solves L^T X = A for one tile of columns of the n rows `a` (of `columns`
  /// columns), writes X over A and, rows reversed, into `packed` [n][tile_rows].
  void (*solve_tile)(const T* l, std::int64_t l_ld, std::int64_t n, T* a, std::int64_t a_ld, std::int64_t columns,
                     std::int64_t tile, T* packed);
};

struct KernelTable {
  InstructionSet instruction_set;
  TypedKernels<float> f32;
  TypedKernels<double> f64;
};

/// The kernels of one instruction set, which must be supported.
const KernelTable& kernels_for(InstructionSet instruction_set);

/// The kernels of choose_instruction_set(), chosen once.
const KernelTable& kernels();

/// kernels().f32 or .f64.
template <typename T>
const TypedKernels<T>& typed_kernels(const KernelTable& table);
template <>
inline const TypedKernels<float>& typed_kernels<float>(const KernelTable& table) {
  return table.f32;
}
template <>
inline const TypedKernels<double>& typed_kernels<double>(const KernelTable& table) {
  return table.f64;
}

}  // namespace miniquant::kernels
