#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/grid-inl.h"
#include "kernels/kernels.h"
#include "kernels/lanes-inl.h"
#include "kernels/microkernel-inl.h"
#include "kernels/triangle.h"
#include "kernels/vector-inl.h"

// Refinement of codes and scales, rows as lanes. With E = W - dequantized and G = E H, the loss e H e^T of a row
// changes
//   by  t^2 H_jj - 2 t G_j                    if column j's dequantized value moves by t
//   by  d^2 z H_gg z^T - 2 d z G_g^T          if group g's scale moves by d, with z its codes - zero point
// and in a two-level grid, where the minimum moves by m at the same time,
//   by  d^2 z H_gg z^T - 2 d m z H_gg 1^T + m^2 1 H_gg 1^T - 2 d z G_g^T + 2 m 1 G_g^T
//
//   for each round, from the first group to the last or back, for each group g
//     G_g = E H[:, g]                                              the blocked product, most of the work
//     twice
//       scale_g += z G_g^T / (z H_gg z^T), rounded as stored       where that lowers the loss
//       for each column j of the group
//         move to the grid point nearest to dequantized_j + G_j / H_jj, where that lowers the loss
//
// G at the start is given; products are taken of the changes of E since then. Rounds alternate in direction, so the
// groups ahead are as the round before left them, and what they add to G was computed in that round. So a round takes
// half a product with H. (A known saving of symmetric Gauss-Seidel iterations: Conrad and Wallach 1979, "Alternating
// methods for sets of linear equations".)
//
// (Coordinate descent: QuantEase, arXiv:2309.01885; CDQuant, arXiv:2406.17542.) Start reading at refine().

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// The arrays of a pass in the workspace. B = columns of the longest group.
template <typename T>
struct RefineArrays {
  T* start;               // [tiles][K][lane]  E H at the start
  T* change;              // [tiles][K][lane]  change of E since the start
  T* level;               // [tiles][K][lane]  code - zero point
  T* passed;              // [tiles][K][lane]  change H over the groups that a round had passed when it reached a column
  T* gradient;            // [tiles][B][lane]  G of the group
  T* other;               // [B][lane]         z H_gg, then -t of the columns visited
  T* column_sums;         // [B]               1 H_gg
  double* loss;           // [tiles][lane]
  std::int64_t elements;  // in elements of T
};

template <typename T>
MINIQUANT_INLINE RefineArrays<T> lay_out(const RefineProblem<T>& problem, std::int64_t tiles, T* workspace) {
  const std::int64_t lanes = tiles * kTileRows<T>;
  const std::int64_t group = min_of(problem.grid.group_size, problem.columns);
  WorkspaceCutter<T> cutter = {workspace};
  RefineArrays<T> arrays;
  arrays.start = cutter.take(lanes * problem.columns);
  arrays.change = cutter.take(lanes * problem.columns);
  arrays.level = cutter.take(lanes * problem.columns);
  arrays.passed = cutter.take(lanes * problem.columns);
  arrays.gradient = cutter.take(lanes * group);
  arrays.other = cutter.take(kTileRows<T> * group);
  arrays.column_sums = cutter.take(group);
  arrays.loss = reinterpret_cast<double*>(cutter.take(lanes * kElementsPerDouble<T>));
  arrays.elements = cutter.used;
  return arrays;
}

/// One tile of rows of the pass.
template <typename T>
struct RefineTile {
  std::int64_t row;   // first row
  std::int64_t rows;  // valid lanes
  T* start;           // [K][lane]
  T* change;          // [K][lane]
  T* level;           // [K][lane]
  T* passed;          // [K][lane]
  T* gradient;        // [B][lane]
  T* other;           // [B][lane]
  T* column_sums;     // [B]
  double* loss;       // [lane]
};

template <typename T>
MINIQUANT_INLINE RefineTile<T> tile_of(const RefineProblem<T>& problem, const RefineArrays<T>& arrays,
                                       std::int64_t row_begin, std::int64_t row_end, std::int64_t tile) {
  const std::int64_t row = row_begin + tile * kTileRows<T>;
  const std::int64_t lanes = tile * kTileRows<T>;
  const std::int64_t group = min_of(problem.grid.group_size, problem.columns);
  return {row,
          min_of(row_end - row, kTileRows<T>),
          arrays.start + lanes * problem.columns,
          arrays.change + lanes * problem.columns,
          arrays.level + lanes * problem.columns,
          arrays.passed + lanes * problem.columns,
          arrays.gradient + lanes * group,
          arrays.other,
          arrays.column_sums,
          arrays.loss + lanes};
}

/// Reads a row into its lane.
template <typename T>
MINIQUANT_INLINE void read_row(const RefineProblem<T>& problem, const RefineTile<T>& tile, std::int64_t lane,
                               Span columns) {
  const std::int64_t row = tile.row + lane;
  const std::int8_t* const codes = problem.grid.codes + row * problem.columns;
  const std::int8_t* const zero_points = problem.grid.zero_points + row * problem.grid.groups;
  const T* const gradient = problem.gradient + row * SymmetricLayout{problem.columns}.padded_columns();
  Span group;
  for (std::int64_t begin = columns.begin; begin < columns.end; begin = group.end) {
    group = group_of(problem.grid.group_size, begin, columns.end);
    const std::int8_t zero_point = zero_points[begin / problem.grid.group_size];
    for (std::int64_t j = begin; j < group.end; ++j) {
      column_of<T>(tile.level, j)[lane] = static_cast<T>(codes[j] - zero_point);
      column_of<T>(tile.start, j)[lane] = gradient[j];
    }
  }
}

/// Lanes past the last row are all 0, so nothing moves them.
template <typename T>
MINIQUANT_INLINE void read_rows(const RefineProblem<T>& problem, const RefineTile<T>& tile) {
  for (std::int64_t i = 0; i < problem.columns * kTileRows<T>; ++i) {
    tile.change[i] = T(0);
    tile.passed[i] = T(0);
  }
  for (std::int64_t begin = 0; begin < problem.columns; begin += kColumnsPerCopy) {
    const Span columns = span_of(begin, kColumnsPerCopy, problem.columns);
    for (std::int64_t lane = 0; lane < tile.rows; ++lane) {
      read_row(problem, tile, lane, columns);
    }
    for (std::int64_t lane = tile.rows; lane < kTileRows<T>; ++lane) {
      for (std::int64_t j = columns.begin; j < columns.end; ++j) {
        column_of<T>(tile.level, j)[lane] = T(0);
        column_of<T>(tile.start, j)[lane] = T(0);
      }
    }
  }
  for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
    tile.loss[lane] = lane < tile.rows ? static_cast<double>(problem.row_loss[tile.row + lane]) : 0.0;
  }
}

template <typename T>
MINIQUANT_INLINE void write_row(const RefineProblem<T>& problem, const RefineTile<T>& tile, std::int64_t lane,
                                Span columns) {
  const std::int64_t row = tile.row + lane;
  std::int8_t* const codes = problem.grid.codes + row * problem.columns;
  const std::int8_t* const zero_points = problem.grid.zero_points + row * problem.grid.groups;
  Span group;
  for (std::int64_t begin = columns.begin; begin < columns.end; begin = group.end) {
    group = group_of(problem.grid.group_size, begin, columns.end);
    const std::int8_t zero_point = zero_points[begin / problem.grid.group_size];
    for (std::int64_t j = begin; j < group.end; ++j) {
      codes[j] = static_cast<std::int8_t>(static_cast<std::int32_t>(column_of<T>(tile.level, j)[lane]) + zero_point);
    }
  }
}

template <typename T>
MINIQUANT_INLINE void write_rows(const RefineProblem<T>& problem, const RefineTile<T>& tile) {
  for (std::int64_t begin = 0; begin < problem.columns; begin += kColumnsPerCopy) {
    const Span columns = span_of(begin, kColumnsPerCopy, problem.columns);
    for (std::int64_t lane = 0; lane < tile.rows; ++lane) {
      write_row(problem, tile, lane, columns);
    }
  }
  for (std::int64_t lane = 0; lane < tile.rows; ++lane) {
    problem.row_loss[tile.row + lane] = static_cast<T>(tile.loss[lane]);
  }
}

/// to[columns] += values[terms] H[terms, columns], values [terms][lane]. Terms are added in their order.
template <typename T>
MINIQUANT_INLINE void add_products(const RefineProblem<T>& problem, const T* values, Span terms, Span columns, T* to,
                                   const Upcoming& upcoming = {}) {
  Fetcher fetcher(upcoming);
  Span strip;
  for (std::int64_t first = columns.begin; first < columns.end; first = strip.end) {
    strip = strip_of(first, columns.end);
    T* const sum = column_of<T>(to, first - columns.begin);
    TileAccumulator<T> accumulator;
    load(accumulator, sum, kTileRows<T>, strip.size());
    FetchLines lines = fetcher.take(terms.size());
    accumulate(accumulator, symmetric_entry(problem.hessian, SymmetricLayout{problem.columns}, terms.begin, first),
               {kPanelColumns, 1}, values, kTileRows<T>, terms.size(), lines);
    store(accumulator, sum, kTileRows<T>, strip.size());
  }
}

/// z H_gg of a group, in tile.other.
template <typename T>
MINIQUANT_INLINE const T* multiply_levels(const RefineProblem<T>& problem, const RefineTile<T>& tile, Span group) {
  for (std::int64_t i = 0; i < group.size() * kTileRows<T>; ++i) {
    tile.other[i] = T(0);
  }
  add_products(problem, column_of<T>(tile.level, group.begin), group, group, tile.other);
  return tile.other;
}

/// Moves the scale of a group to the stored value of least loss, and updates its error and gradient. Returns whether
/// any lane's scale moved.
template <typename T>
MINIQUANT_INLINE bool refit_scale(const RefineProblem<T>& problem, const RefineTile<T>& tile, Span group) {
  const std::int64_t count = group.size() * kTileRows<T>;
  const T* const level = column_of<T>(tile.level, group.begin);
  const T* const products = multiply_levels(problem, tile, group);

  double slope[kTileRows<T>] = {};
  double curvature[kTileRows<T>] = {};
  for (std::int64_t i = 0; i < count; i += kTileRows<T>) {
    for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
      slope[lane] += static_cast<double>(level[i + lane] * tile.gradient[i + lane]);
      curvature[lane] += static_cast<double>(level[i + lane] * products[i + lane]);
    }
  }
  T moved[kTileRows<T>];
  bool any = false;
  for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
    moved[lane] = T(0);
    if (lane < tile.rows && curvature[lane] > 0.0) {
      const std::int64_t group_index = group.begin / problem.grid.group_size;
      const std::int64_t at = (tile.row + lane) * problem.grid.groups + group_index;
      T& scale = problem.grid.scales[at];
      const RowScales<T> round_scale = scales_of_row(problem.grid, tile.row + lane);
      const std::int32_t levels =
          levels_beside(problem.grid.range, problem.grid.zero_points[at] - problem.grid.range.code_min);
      const T best = scale + static_cast<T>(slope[lane] / curvature[lane]);
      const T magnitude = best > T(0) ? best : -best;
      const HeldRange<T> held = held_range(problem.grid, tile.row + lane, group_index);
      const T least =
          held.is_empty() ? T(0) : least_scale(problem.grid.range, problem.grid.zero_points[at], held, best > T(0));
      const T rounded = round_scale(magnitude > least ? magnitude : least, levels);
      const T stored = best > T(0) ? rounded : -rounded;
      const double move = static_cast<double>(stored) - static_cast<double>(scale);
      const double change = move * (move * curvature[lane] - 2.0 * slope[lane]);
      if (change < 0.0 && (best > T(0)) == (scale > T(0))) {
        moved[lane] = stored - scale;
        scale = stored;
        tile.loss[lane] += change;
        any = true;
      }
    }
  }
  if (any) {
    T* const change = column_of<T>(tile.change, group.begin);
    for (std::int64_t i = 0; i < count; i += kTileRows<T>) {
      for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
        change[i + lane] -= moved[lane] * level[i + lane];
        tile.gradient[i + lane] -= moved[lane] * products[i + lane];
      }
    }
  }
  return any;
}

/// The quadratic form by which the loss of a lane changes where scale and minimum of a group move.
struct StepForm {
  double scale_slope;      // z G^T
  double minimum_slope;    // 1 G^T
  double scale_curvature;  // z H z^T
  double mixed;            // z H 1^T
  double curvature;        // 1 H 1^T

  /// Of moves d of the scale and m of the minimum.
  [[nodiscard]] MINIQUANT_INLINE double change(double d, double m) const {
    return d * (d * scale_curvature - 2.0 * scale_slope) + m * (m * curvature + 2.0 * (minimum_slope - d * mixed));
  }

  /// The best move of the minimum where the scale moves by d.
  [[nodiscard]] MINIQUANT_INLINE double minimum_move(double d) const { return (d * mixed - minimum_slope) / curvature; }

  /// The best move of the scale where the minimum moves as is best, or not at all.
  [[nodiscard]] MINIQUANT_INLINE double scale_move(bool with_minimum) const {
    constexpr double kIndependent = 1e-6;  // below that fraction scale and minimum do the same
    const double determinant = scale_curvature * curvature - mixed * mixed;
    if (with_minimum && determinant > kIndependent * scale_curvature * curvature) {
      return (scale_slope * curvature - minimum_slope * mixed) / determinant;
    }
    return scale_slope / scale_curvature;
  }
};

MINIQUANT_INLINE double floor_of(double value) {
  const auto below = static_cast<double>(static_cast<std::int64_t>(value));
  return below > value ? below - 1.0 : below;
}

MINIQUANT_INLINE double clamp_of(double value, double low, double high) {
  return value < low ? low : value > high ? high : value;
}

/// Scale and minimum of a group, and the change of the loss that they bring.
template <typename T>
struct StepChoice {
  T scale;
  T minimum;
  double change;
};

/// The multiples of the steps with the least loss: of the scale the two around the best value of any size, each with
/// its best minimum. `now` has the present ones, which stay where neither is better.
template <typename T>
MINIQUANT_INLINE StepChoice<T> best_steps(const StepsView<T>& steps, std::int64_t at, const StepForm& form,
                                          StepChoice<T> now) {
  const auto scale = static_cast<double>(now.scale);
  const auto minimum = static_cast<double>(now.minimum);
  const auto step = static_cast<double>(steps.scale_steps[at]);
  const double minimum_step = steps.minima == nullptr ? 0.0 : static_cast<double>(steps.minimum_steps[at]);
  const bool moves_minimum = minimum_step > 0.0 && form.curvature > 0.0;
  const double highest = static_cast<double>(steps.highest);
  const double wanted =
      clamp_of((scale + form.scale_move(moves_minimum)) / step, static_cast<double>(steps.lowest), highest);
  StepChoice<T> best = now;
  for (const double multiple : {floor_of(wanted), floor_of(wanted) + 1.0}) {
    const double other = multiple * step;
    if (multiple > highest || (other > 0.0) != (scale > 0.0) || other == 0.0) {
      continue;
    }
    double other_minimum = minimum;
    if (moves_minimum) {
      const double exact = clamp_of((minimum + form.minimum_move(other - scale)) / minimum_step, 0.0, highest);
      other_minimum = floor_of(exact + 0.5) * minimum_step;
    }
    const double change = form.change(other - scale, other_minimum - minimum);
    if (change < best.change) {
      best = {static_cast<T>(other), static_cast<T>(other_minimum), change};
    }
  }
  return best;
}

/// Moves scale and minimum of a group of a two-level grid to the multiples of their steps of least loss, and updates
/// the group's error and gradient. Returns whether any lane's moved.
template <typename T>
MINIQUANT_INLINE bool refit_steps(const RefineProblem<T>& problem, const RefineTile<T>& tile, Span group) {
  const SymmetricLayout layout = {problem.columns};
  const T* const level = column_of<T>(tile.level, group.begin);
  const T* const products = multiply_levels(problem, tile, group);
  double curvature = 0.0;
  for (std::int64_t j = group.begin; j < group.end; ++j) {
    T sum = T(0);
    for (std::int64_t i = group.begin; i < group.end; ++i) {
      sum += *symmetric_entry(problem.hessian, layout, i, j);
    }
    tile.column_sums[j - group.begin] = sum;
    curvature += static_cast<double>(sum);
  }

  double scale_slope[kTileRows<T>] = {};
  double minimum_slope[kTileRows<T>] = {};
  double scale_curvature[kTileRows<T>] = {};
  double mixed[kTileRows<T>] = {};
  for (std::int64_t j = 0; j < group.size(); ++j) {
    for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
      const std::int64_t i = j * kTileRows<T> + lane;
      scale_slope[lane] += static_cast<double>(level[i] * tile.gradient[i]);
      minimum_slope[lane] += static_cast<double>(tile.gradient[i]);
      scale_curvature[lane] += static_cast<double>(level[i] * products[i]);
      mixed[lane] += static_cast<double>(level[i] * tile.column_sums[j]);
    }
  }
  const StepsView<T>& steps = problem.grid.steps;
  T scale_move[kTileRows<T>];
  T minimum_move[kTileRows<T>];
  bool any = false;
  for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
    scale_move[lane] = T(0);
    minimum_move[lane] = T(0);
    const std::int64_t group_index = group.begin / problem.grid.group_size;
    if (lane >= tile.rows || !(scale_curvature[lane] > 0.0) ||
        !held_range(problem.grid, tile.row + lane, group_index).is_empty()) {
      continue;
    }
    const std::int64_t at = (tile.row + lane) * problem.grid.groups + group_index;
    T& scale = problem.grid.scales[at];
    const T minimum = steps.minima == nullptr ? T(0) : steps.minima[at];
    const StepForm form = {scale_slope[lane], minimum_slope[lane], scale_curvature[lane], mixed[lane], curvature};
    const StepChoice<T> best = best_steps<T>(steps, at, form, {scale, minimum, 0.0});
    if (best.change < 0.0) {
      scale_move[lane] = best.scale - scale;
      minimum_move[lane] = best.minimum - minimum;
      scale = best.scale;
      if (steps.minima != nullptr) {
        steps.minima[at] = best.minimum;
      }
      tile.loss[lane] += best.change;
      any = true;
    }
  }
  if (any) {
    T* const change = column_of<T>(tile.change, group.begin);
    for (std::int64_t j = 0; j < group.size(); ++j) {
      for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
        const std::int64_t i = j * kTileRows<T> + lane;
        change[i] += minimum_move[lane] - scale_move[lane] * level[i];
        tile.gradient[i] += minimum_move[lane] * tile.column_sums[j] - scale_move[lane] * products[i];
      }
    }
  }
  return any;
}

/// Moves every column of a group to its best grid point, one after the other. Returns whether any column moved.
template <typename T>
MINIQUANT_INLINE bool move_columns(const RefineProblem<T>& problem, const RefineTile<T>& tile, Span group) {
  const SymmetricLayout layout = {problem.columns};
  T* const minus_moves = tile.other;
  T scale_of[kTileRows<T>];
  T lowest[kTileRows<T>];
  T highest[kTileRows<T>];
  for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
    const std::int64_t at = (tile.row + lane) * problem.grid.groups + group.begin / problem.grid.group_size;
    const T zero_point = lane < tile.rows ? static_cast<T>(problem.grid.zero_points[at]) : T(0);
    scale_of[lane] = lane < tile.rows ? problem.grid.scales[at] : T(1);
    lowest[lane] = static_cast<T>(problem.grid.range.code_min) - zero_point;
    highest[lane] = static_cast<T>(problem.grid.range.code_max) - zero_point;
  }
  Vector<T> any = {};
  Span strip;
  for (std::int64_t first = group.begin; first < group.end; first = strip.end) {
    strip = strip_of(first, group.end);
    TileAccumulator<T> gradient;
    load(gradient, column_of<T>(tile.gradient, first - group.begin), kTileRows<T>, strip.size());
    accumulate(gradient, symmetric_entry(problem.hessian, layout, group.begin, first), {kPanelColumns, 1}, minus_moves,
               kTileRows<T>, first - group.begin);
    Vector<T> lost[kVectorsPerTile] = {};
#pragma GCC unroll 8
    for (std::int64_t c = 0; c < kStripColumns; ++c) {
      const std::int64_t j = first + c;
      if (j < strip.end) {
        const T diagonal = *symmetric_entry(problem.hessian, layout, j, j);
        Vector<T> minus_move[kVectorsPerTile];
#pragma GCC unroll 8
        for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
          const std::int64_t lane = v * kLanes<T>;
          T* const level_at = column_of<T>(tile.level, j) + lane;
          T* const change_at = column_of<T>(tile.change, j) + lane;
          const Vector<T> scale = load<T>(scale_of + lane);
          const Vector<T> level = load<T>(level_at);
          const Vector<T> g = gradient.value[c][v];
          const Vector<T> best = round_to_level<T, Vector<T>>(level * scale + g / diagonal, scale,
                                                              load<T>(lowest + lane), load<T>(highest + lane));
          const Vector<T> full_move = (best - level) * scale;
          const Vector<T> full_change = full_move * (full_move * diagonal - (g + g));
          const auto better = full_change < T(0);
          const Vector<T> none = {};
          const Vector<T> move = better ? full_move : none;
          minus_move[v] = -move;
          lost[v] += better ? full_change : none;
          any += better ? full_move * full_move : none;
          store<T>(level_at, better ? best : level);
          store<T>(change_at, load<T>(change_at) - move);
          store<T>(column_of<T>(minus_moves, j - group.begin) + lane, minus_move[v]);
        }
        accumulate_term(gradient, symmetric_entry(problem.hessian, layout, j, first), 1, minus_move, c + 1,
                        kStripColumns);
      }
      if (j % kColumnsPerLoss == kColumnsPerLoss - 1 || c == kStripColumns - 1) {
        add_loss<T>(lost, tile.loss);
      }
    }
  }
  bool moved = false;
  for (std::int64_t lane = 0; lane < kLanes<T>; ++lane) {
    moved = moved || any[lane] > T(0);
  }
  return moved;
}

/// Passes over a group for each gradient: a pass is cheap beside the product that computes the gradient. The number is
/// fixed, so a row does not depend on the other rows of its tile.
constexpr std::int64_t kPassesPerGroup = 2;

/// Moves the scale and the columns of a group. Returns whether anything moved.
template <typename T>
MINIQUANT_INLINE bool refine_group(const RefineProblem<T>& problem, const RefineTile<T>& tile, Span group) {
  bool moved = false;
  for (std::int64_t pass = 0; pass < kPassesPerGroup; ++pass) {
    if (pass > 0) {
      // G += (-t) H_gg, for the moves of the columns in the previous pass
      add_products(problem, tile.other, group, group, tile.gradient);
    }
    const bool has_steps = problem.grid.steps.scale_steps != nullptr;
    moved = (has_steps ? refit_steps(problem, tile, group) : refit_scale(problem, tile, group)) || moved;
    moved = move_columns(problem, tile, group) || moved;
  }
  return moved;
}

/// The tiles of a pass.
template <typename T>
struct RefineTiles {
  std::int64_t count;
  RefineTile<T> tile[kTilesPerPass];
};

/// Sets G of a group in every tile, without the contribution of its own columns. The round has `passed` the columns on
/// one side of the group.
template <typename T>
MINIQUANT_INLINE void set_gradient(const RefineProblem<T>& problem, const RefineTiles<T>& tiles, Span group,
                                   Span passed) {
  const std::int64_t count = group.size() * kTileRows<T>;
  const std::int64_t at = group.begin * kTileRows<T>;
  for (std::int64_t t = 0; t < tiles.count; ++t) {
    const RefineTile<T>& tile = tiles.tile[t];
    for (std::int64_t i = 0; i < count; ++i) {
      // The groups that the previous round had passed are those ahead of this one.
      tile.gradient[i] = tile.start[at + i] + tile.passed[at + i];
      tile.passed[at + i] = T(0);
    }
  }
  Span terms;
  for (std::int64_t begin = passed.begin; begin < passed.end; begin = terms.end) {
    terms = span_of(begin, kDepth<T>, passed.end);
    const Span next = span_of(terms.end, kDepth<T>, passed.end);
    for (std::int64_t t = 0; t < tiles.count; ++t) {
      const RefineTile<T>& tile = tiles.tile[t];
      Upcoming upcoming = {};
      if (t + 1 < tiles.count) {
        add_columns<T>(upcoming, tiles.tile[t + 1].change, terms);
      } else {
        add_columns<T>(upcoming, tiles.tile[0].change, next);
        add_rows(upcoming, problem.hessian, SymmetricLayout{problem.columns}, next, group);
      }
      add_products(problem, column_of<T>(tile.change, begin), terms, group, tile.passed + at, upcoming);
    }
  }
  for (std::int64_t t = 0; t < tiles.count; ++t) {
    const RefineTile<T>& tile = tiles.tile[t];
    for (std::int64_t i = 0; i < count; ++i) {
      tile.gradient[i] += tile.passed[at + i];
    }
  }
}

/// One round over all groups: even rounds from the first group on, odd rounds from the last. Returns whether anything
/// moved.
template <typename T>
MINIQUANT_INLINE bool refine_round(const RefineProblem<T>& problem, const RefineTiles<T>& tiles, std::int64_t round) {
  const bool forward = round % 2 == 0;
  const std::int64_t group_size = problem.grid.group_size;
  const std::int64_t groups = ceil_div(problem.columns, group_size);
  bool moved = false;
  for (std::int64_t i = 0; i < groups; ++i) {
    const Span group = span_of((forward ? i : groups - 1 - i) * group_size, group_size, problem.columns);
    set_gradient(problem, tiles, group, forward ? Span{0, group.begin} : Span{group.end, problem.columns});
    for (std::int64_t t = 0; t < tiles.count; ++t) {
      const RefineTile<T>& tile = tiles.tile[t];
      add_products(problem, column_of<T>(tile.change, group.begin), group, group, tile.gradient);
      moved = refine_group(problem, tile, group) || moved;
    }
  }
  return moved;
}

template <typename T>
void refine(const RefineProblem<T>& problem, std::int64_t row_begin, std::int64_t row_end, T* workspace) {
  constexpr std::int64_t kRowsPerPass = kTilesPerPass * kTileRows<T>;
  for (std::int64_t row = row_begin; row < row_end; row += kRowsPerPass) {
    const std::int64_t end = min_of(row_end, row + kRowsPerPass);
    RefineTiles<T> tiles = {};
    tiles.count = ceil_div(end - row, kTileRows<T>);
    const RefineArrays<T> arrays = lay_out(problem, tiles.count, workspace);
    for (std::int64_t t = 0; t < tiles.count; ++t) {
      tiles.tile[t] = tile_of(problem, arrays, row, end, t);
      read_rows(problem, tiles.tile[t]);
    }
    for (std::int64_t round = 0; round < problem.rounds; ++round) {
      if (!refine_round(problem, tiles, round)) {
        break;
      }
    }
    for (std::int64_t t = 0; t < tiles.count; ++t) {
      write_rows(problem, tiles.tile[t]);
    }
  }
}

template <typename T>
std::int64_t refine_workspace(const RefineProblem<T>& problem, std::int64_t rows) {
  const std::int64_t tiles = ceil_div(rows, kTileRows<T>);
  return lay_out<T>(problem, min_of(tiles, kTilesPerPass), nullptr).elements;
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
