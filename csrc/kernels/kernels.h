#pragma once

#include <cstdint>

#include "kernels/instruction_set.h"
#include "kernels/triangle.h"

// The kernels: serial, reentrant, on raw pointers. The caller checks sizes. Matrices are row-major and contiguous
// unless a leading dimension is given. N rows (out features), K columns (in features), G columns per group.
//
// Every result is a sum in a fixed order per element, so it does not depend on how the caller splits the work.

namespace miniquant::kernels {

/// Tiles of rows that share one reading of L or H.
inline constexpr std::int64_t kTilesPerPass = 4;

inline constexpr std::int64_t kUpcomingRanges = 6;

/// Memory that the caller's next calls read, in that order; empty ranges are left out. A hint: a kernel may fetch it
/// while it computes.
struct Upcoming {
  struct Range {
    const void* begin;
    std::int64_t bytes;
  };
  Range ranges[kUpcomingRanges];
};

/// The integers of a grid. `code_max` >= `code_min`; both within int8.
struct CodeRange {
  std::int32_t code_min;
  std::int32_t code_max;
  bool symmetric;
};

/// Rounds a positive scale to the dtype in which it is stored: never to 0, and never to a scale of which `levels`
/// multiples are not finite in that dtype.
template <typename T>
using RoundScale = T (*)(T scale, std::int32_t levels);

/// What a two-level grid has beside its scales: value = (code - zero point) * scale - minimum, where scales and minima
/// are whole multiples of steps that groups share.
template <typename T>
struct StepsView {
  const T* scale_steps = nullptr;    ///< [N, groups], none of them 0; null where the grid has one level
  const T* minimum_steps = nullptr;  ///< [N, groups], none of them negative; null where there are no minima
  T* minima = nullptr;               ///< [N, groups]; null where there are none
  std::int32_t lowest = 0;           ///< multiple of a step that a scale may be; it is never 0
  std::int32_t highest = 0;          ///< multiple of a step that a scale or a minimum may be; minima are at least 0
};

/// One group-quantized weight, as pointers to its arrays.
template <typename T>
struct GridView {
  CodeRange range;
  std::int64_t group_size;
  std::int64_t groups;       ///< per row
  T* scales;                 ///< [N, groups]
  std::int8_t* zero_points;  ///< [N, groups]
  std::int8_t* codes;        ///< [N, K]
  RoundScale<T> round_scale;
  /// [N], powers of two. Weights and scales of a row are in units of its entry; `round_scale` takes scale times unit.
  /// Null where every unit is 1.
  const T* units = nullptr;
  /// [N, groups, 2]: the lowest (at most 0) and the highest weight (at least 0) that no scale of the group may clip.
  /// Null where all may be clipped.
  const T* held = nullptr;
  /// Read by refine() only: the other kernels take weights to which the minima are added.
  StepsView<T> steps = {};
};

/// The scales that a search tries: those for ranges `factors` times as wide as the group's.
template <typename T>
struct ScaleSearch {
  const T* factors;  ///< [factor_count]; ties go to the first
  std::int64_t factor_count;
  const T* importance;  ///< [K], the weight of each column's squared error; a sweep does not read it
};

/// One step of a sweep: it quantizes stored column `column`.
template <typename T>
struct SweepStep {
  std::int64_t column;
  std::int64_t group;  ///< the group of that column
  T inverse_pivot;     ///< 1 / R_jj
  T pivot_squared;     ///< R_jj^2 as it counts in the loss
};

/// A GPTQ sweep: docs/algorithm.md, "The form without an inverse".
template <typename T>
struct SweepProblem {
  std::int64_t columns;  ///< K
  const T* weight;       ///< [N, K]
  GridView<T> grid;
  bool dynamic_scales;           ///< scales are computed when a segment (one group) is reached, otherwise read
  ScaleSearch<T> search;         ///< for dynamic scales
  std::int64_t beam_scales;      ///< number of the best scales that a beam search tries; 0: no beam search
  const SweepStep<T>* steps;     ///< [K]
  const T* triangle;             ///< L = R^T in the order of the sweep, laid out by TriangleLayout{columns}
  std::int64_t segment_columns;  ///< at least 1; the columns of a group if scales are dynamic
  std::int64_t block_columns;    ///< a multiple of segment_columns
  T* row_loss;                   ///< [N]
  T* gradient;  ///< [N, SymmetricLayout::padded_columns()] E H, 0 past the last column; null: not computed
};

/// Per-row quadratic forms e H e^T over the lower triangle of H.
template <typename T>
struct QuadraticFormProblem {
  TriangleLayout triangle_layout;  ///< of K columns
  const T* error;                  ///< [N, K]
  const T* triangle;               ///< H, the diagonal included
  T* form;                         ///< [N]
};

/// Input and output of the kernels that lower the loss of a quantized weight: kernels/descent-inl.h and
/// kernels/refine-inl.h.
template <typename T>
struct RefineProblem {
  std::int64_t columns;  ///< K
  GridView<T> grid;      ///< codes change; scales and minima change in refine() only; zero points do not
  const T* hessian;      ///< the damped H, laid out by SymmetricLayout{columns}
  T* gradient;           ///< [N, SymmetricLayout::padded_columns()], E H before, and after a descent
  std::int64_t rounds;   ///< max rounds
  T* row_loss;           ///< [N], e H e^T before and after
};

/// The codes of a weight and what gives their values.
template <typename T>
struct CodesView {
  std::int64_t columns;            ///< K
  std::int64_t group_size;         ///< at most K
  std::int64_t groups;             ///< per row
  const std::int8_t* codes;        ///< [N, K]
  const T* scales;                 ///< [N, groups]
  const std::int8_t* zero_points;  ///< [N, groups]
};

/// Rows of a matrix, each times a number.
template <typename T>
struct ScaledRows {
  const T* rows;         ///< [count, columns], `ld` apart
  std::int64_t ld;       ///< leading dimension
  std::int64_t count;    ///< number of rows
  std::int64_t columns;  ///< at most ld
  const T* factors;      ///< [count]; null: 1 each
};

/// What decides whether a part of a matrix counts as finite and symmetric.
template <typename T>
struct SymmetryFigures {
  bool finite;
  T largest;            ///< max |H_ij|, if finite
  T largest_asymmetry;  ///< max |H_ij - H_ji|, if finite
};

/// The kernels for one element type. A tile is `tile_rows` lanes wide and divides kPanelColumns.
template <typename T>
struct TypedKernels {
  std::int64_t tile_rows;

  /// largest[row] = max |weight[row, :]| for rows [row_begin, row_end) of weight [rows, K].
  void (*largest_magnitudes)(const T* weight, std::int64_t columns, std::int64_t row_begin, std::int64_t row_end,
                             T* largest);

  /// scales, zero_points = grid of weight [rows, K] (all groups of a row), for rows [row_begin, row_end).
  void (*compute_grid)(const GridView<T>& grid, const T* weight, std::int64_t columns, std::int64_t row_begin,
                       std::int64_t row_end);

  /// The same with the scales of least weighted squared error.
  void (*search_grid)(const GridView<T>& grid, const ScaleSearch<T>& search, const T* weight, std::int64_t columns,
                      std::int64_t row_begin, std::int64_t row_end);

  /// codes = round(weight / scale) + zero_point, clamped, for rows [row_begin, row_end).
  void (*round_to_nearest)(const GridView<T>& grid, const T* weight, std::int64_t columns, std::int64_t row_begin,
                           std::int64_t row_end);

  /// values [N, K] = (code - zero point) * scale, for rows [row_begin, row_end).
  void (*dequantize)(const CodesView<T>& codes, std::int64_t row_begin, std::int64_t row_end, T* values);

  /// Elements of workspace that `sweep` needs for that number of rows.
  std::int64_t (*sweep_workspace)(const SweepProblem<T>& problem, std::int64_t rows);

  /// Quantizes rows [row_begin, row_end). `workspace` is aligned to 64 bytes.
  void (*sweep)(const SweepProblem<T>& problem, std::int64_t row_begin, std::int64_t row_end, T* workspace);

  /// Elements of workspace that `descend` needs for that number of rows.
  std::int64_t (*descent_workspace)(const RefineProblem<T>& problem, std::int64_t rows);

  /// Lowers the loss of rows [row_begin, row_end) by moving codes. `workspace` is aligned to 64 bytes.
  void (*descend)(const RefineProblem<T>& problem, std::int64_t row_begin, std::int64_t row_end, T* workspace);

  /// Elements of workspace that `refine` needs for that number of rows.
  std::int64_t (*refine_workspace)(const RefineProblem<T>& problem, std::int64_t rows);

  /// Lowers the loss of rows [row_begin, row_end) by moving scales and codes. `workspace` is aligned to 64 bytes.
  void (*refine)(const RefineProblem<T>& problem, std::int64_t row_begin, std::int64_t row_end, T* workspace);

  /// Elements of workspace that `quadratic_form` needs.
  std::int64_t (*quadratic_form_workspace)(const QuadraticFormProblem<T>& problem);

  /// form = e H e^T for rows [row_begin, row_end). `workspace` is aligned to 64 bytes.
  void (*quadratic_form)(const QuadraticFormProblem<T>& problem, std::int64_t row_begin, std::int64_t row_end,
                         T* workspace);

  /// tiles[t][r][lane] = factors[r] * rows[r * ld + t * tile_rows + lane], 0 past `columns`, for tile t and r < count.
  void (*pack_tile)(const ScaledRows<T>& from, std::int64_t tile, T* tiles);

  /// A[j, i] += sum_r rows[r, j] rows[r, i] for i in tile i_tile and j in tile j_tile >= i_tile, and A[i, j] likewise.
  /// `tiles` holds the packed rows [r < count, columns]; A has leading dimension ld. Tile i_tile + 1 comes next at
  /// best.
  void (*rank_update)(T* a, std::int64_t ld, std::int64_t columns, const T* tiles, std::int64_t count,
                      std::int64_t i_tile, std::int64_t j_tile);

  /// A[j, i] += sum_r left[r, j] right[r, i] for j in tile j_tile and i in tile i_tile. `left` and `right` hold packed
  /// rows [r < count, rows] and [r < count, columns]; A is [rows, columns]. Tile i_tile + 1 comes next at best.
  void (*product_update)(T* a, std::int64_t rows, std::int64_t columns, const T* left, const T* right,
                         std::int64_t count, std::int64_t j_tile, std::int64_t i_tile);

  /// The figures of all entries H[i, j] and H[j, i] with row_begin <= i < row_begin + kPanelColumns and j at most in
  /// the square on the diagonal. H is [K, K]; row_begin is a multiple of kPanelColumns.
  SymmetryFigures<T> (*survey_symmetry)(const T* h, std::int64_t columns, std::int64_t row_begin);

  /// average[i][j] = (factor H + factor H^T) / 2 for the square of kPanelColumns rows and columns that begins at
  /// (i_begin, j_begin), or as many rows as there are; 0 past the last column. Each product is rounded to the type of
  /// the average. `average` is [rows][kPanelColumns].
  void (*average_square_as_f32)(const T* h, std::int64_t columns, std::int64_t i_begin, std::int64_t j_begin,
                                double factor, float* average);
  void (*average_square_as_f64)(const T* h, std::int64_t columns, std::int64_t i_begin, std::int64_t j_begin,
                                double factor, double* average);

  /// to[j][i] = from[i][j] for i < rows and j < width.
  void (*transpose)(const T* from, std::int64_t ld, std::int64_t rows, std::int64_t width, T* to, std::int64_t to_ld);

  /// The number of terms for which one call of `subtract_products` is fastest.
  std::int64_t terms_per_product;

  /// block[j, i] -= sum_k left[k, j] right[k, i] for j < rows and every i; all are [.][kPanelColumns], k < count.
  void (*subtract_products)(const T* left, const T* right, std::int64_t count, std::int64_t rows, T* block,
                            const Upcoming& upcoming);

  /// Factors block = L^T L from its last row up (L lower triangular, in the lower triangle of `block`, which is
  /// [rows][kPanelColumns]; what lies above the diagonal may change). Returns -1, or the row whose pivot is not
  /// positive.
  std::int64_t (*factor_block)(T* block, std::int64_t rows);

  /// block = L^-T block with L the factored block `diagonal`; both are [rows][kPanelColumns].
  void (*solve_block)(const T* diagonal, std::int64_t rows, T* block);
};

struct KernelTable {
  InstructionSet instruction_set;
  TypedKernels<float> f32;
  TypedKernels<double> f64;

  /// As f32.dequantize; values are rounded to the nearest bfloat16 value, whose bits are stored.
  void (*dequantize_to_bf16)(const CodesView<float>& codes, std::int64_t row_begin, std::int64_t row_end,
                             std::uint16_t* values);

  /// max of `count` magnitudes of 2, 4 or 8 byte floating-point values as bits, which compare like integers; those of
  /// infinities and NaN are above all others. 0 where there are no values.
  std::int16_t (*largest_magnitude_bits_16)(const std::int16_t* values, std::int64_t count);
  std::int32_t (*largest_magnitude_bits_32)(const std::int32_t* values, std::int64_t count);
  std::int64_t (*largest_magnitude_bits_64)(const std::int64_t* values, std::int64_t count);
};

/// The kernels of one instruction set, which this CPU must support.
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
