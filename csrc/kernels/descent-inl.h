#pragma once

#include <cstdint>

#include "kernels/grid-inl.h"
#include "kernels/kernels.h"
#include "kernels/lanes-inl.h"
#include "kernels/triangle.h"
#include "kernels/vector-inl.h"

// Moves of single codes, scales held, until no single move lowers the loss. With E = W - dequantized and G = E H,
// moving column j's value by t changes the loss of a row by t^2 H_jj - 2 t G_j, and its G by -t H[j, :]:
//
//   for each round, until no row moves
//     for each panel of columns, for each row that still moves
//       G[panel] -= t H[j, panel]                  for every move (j, t) of the row since its last visit here
//       while a move within the panel lowers the loss
//         make the one that lowers it most
//
// Only a few percent of the codes move, so the work is small beside a product with H, and a panel of H stays in the
// cache for all rows. Columns are the lanes. (Greedy coordinate descent: CDQuant, arXiv:2406.17542.) Start reading at
// descend().

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// Share of a row's loss below which a change may be rounding. No code moves for less, so the descent ends.
template <typename T>
constexpr double kNoChange = 0;
template <>
constexpr double kNoChange<float> = 16 * 0x1p-23;
template <>
constexpr double kNoChange<double> = 16 * 0x1p-52;

template <typename T>
constexpr std::int64_t kPanelVectors = kPanelColumns / kLanes<T>;

/// The arrays of a descent in the workspace. P = panels.
template <typename T>
struct DescentArrays {
  T* diagonal;            // [P * kPanelColumns]  H_jj
  T* inverse_diagonal;    // [P * kPanelColumns]  1 / H_jj; 0 where that is 0, and past the last column
  double* loss;           // [rows]
  T* amount;              // [rows][capacity]     t of the moves, the latest last
  std::int32_t* column;   // [rows][capacity]     j of the moves
  std::int32_t* moves;    // [rows]               number of moves
  std::int32_t* applied;  // [P][rows]            number of moves already applied to G[panel]
  std::int32_t* idle;     // [rows]               panels without a move since the last one
  std::int32_t* active;   // [rows]               rows that still move
  std::int64_t rows;
  std::int64_t capacity;  // of a row's moves
  std::int64_t elements;  // of the workspace, in T
};

template <typename T>
MINIQUANT_INLINE std::int32_t* take_integers(WorkspaceCutter<T>& cutter, std::int64_t count) {
  return reinterpret_cast<std::int32_t*>(cutter.take(count));
}

template <typename T>
MINIQUANT_INLINE DescentArrays<T> lay_out_descent(const RefineProblem<T>& problem, std::int64_t rows, T* workspace) {
  const std::int64_t panels = SymmetricLayout{problem.columns}.panels();
  WorkspaceCutter<T> cutter = {workspace};
  DescentArrays<T> arrays;
  arrays.rows = rows;
  arrays.capacity = problem.columns / 16 + 64;
  arrays.diagonal = cutter.take(panels * kPanelColumns);
  arrays.inverse_diagonal = cutter.take(panels * kPanelColumns);
  arrays.loss = reinterpret_cast<double*>(cutter.take(rows * kElementsPerDouble<T>));
  arrays.amount = cutter.take(rows * arrays.capacity);
  arrays.column = take_integers(cutter, rows * arrays.capacity);
  arrays.moves = take_integers(cutter, rows);
  arrays.applied = take_integers(cutter, rows * panels);
  arrays.idle = take_integers(cutter, rows);
  arrays.active = take_integers(cutter, rows);
  arrays.elements = cutter.used;
  return arrays;
}

/// A row of the problem, and its place in the arrays.
struct DescentRow {
  std::int64_t row;
  std::int64_t index;
};

/// G of a panel, in registers.
template <typename T>
struct PanelGradient {
  Vector<T> value[kPanelVectors<T>];
};

template <typename T>
MINIQUANT_INLINE T* gradient_at(const RefineProblem<T>& problem, std::int64_t row, std::int64_t panel) {
  return problem.gradient + row * SymmetricLayout{problem.columns}.padded_columns() + panel * kPanelColumns;
}

template <typename T>
MINIQUANT_INLINE void load(PanelGradient<T>& gradient, const T* from) {
#pragma GCC unroll 16
  for (std::int64_t v = 0; v < kPanelVectors<T>; ++v) {
    gradient.value[v] = load<T>(from + v * kLanes<T>);
  }
}

template <typename T>
MINIQUANT_INLINE void store(const PanelGradient<T>& gradient, T* to) {
#pragma GCC unroll 16
  for (std::int64_t v = 0; v < kPanelVectors<T>; ++v) {
    store<T>(to + v * kLanes<T>, gradient.value[v]);
  }
}

/// G[panel] -= t H[j, panel].
template <typename T>
MINIQUANT_INLINE void apply_move(const RefineProblem<T>& problem, std::int64_t panel, std::int64_t j, T t,
                                 PanelGradient<T>& gradient) {
  const T* const row = problem.hessian + SymmetricLayout{problem.columns}.offset(j, panel);
  const Vector<T> minus_t = broadcast<T>(-t);
#pragma GCC unroll 16
  for (std::int64_t v = 0; v < kPanelVectors<T>; ++v) {
    gradient.value[v] = multiply_add(minus_t, load<T>(row + v * kLanes<T>), gradient.value[v]);
  }
}

/// Applies the moves of the row since its last visit to this panel.
template <typename T>
MINIQUANT_INLINE void catch_up(const RefineProblem<T>& problem, const DescentArrays<T>& arrays, std::int64_t index,
                               std::int64_t panel, PanelGradient<T>& gradient) {
  std::int32_t& applied = arrays.applied[panel * arrays.rows + index];
  for (; applied < arrays.moves[index]; ++applied) {
    const std::int64_t at = index * arrays.capacity + applied;
    apply_move(problem, panel, arrays.column[at], arrays.amount[at], gradient);
  }
}

/// Empties a row's list of moves, after applying them to every panel except `up_to_date`, where they are applied
/// already.
template <typename T>
MINIQUANT_INLINE void forget_moves(const RefineProblem<T>& problem, const DescentArrays<T>& arrays, DescentRow row,
                                   std::int64_t up_to_date) {
  const std::int64_t panels = SymmetricLayout{problem.columns}.panels();
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    if (panel != up_to_date) {
      PanelGradient<T> gradient;
      load(gradient, gradient_at(problem, row.row, panel));
      catch_up(problem, arrays, row.index, panel, gradient);
      store(gradient, gradient_at(problem, row.row, panel));
    }
    arrays.applied[panel * arrays.rows + row.index] = 0;
  }
  arrays.moves[row.index] = 0;
}

/// The codes in one panel of a row, and their scales; both 0 past the last column.
template <typename T>
struct PanelCodes {
  T code[kPanelColumns];
  T scale[kPanelColumns];
  T inverse_scale[kPanelColumns];
};

template <typename T>
MINIQUANT_INLINE void read_codes(const RefineProblem<T>& problem, std::int64_t row, Span columns,
                                 PanelCodes<T>& codes) {
  const std::int8_t* const from = problem.grid.codes + row * problem.columns + columns.begin;
  const T* const scales = problem.grid.scales + row * problem.grid.groups;
  const std::int64_t count = columns.end - columns.begin;
  for (std::int64_t c = 0; c < count; ++c) {
    codes.code[c] = static_cast<T>(from[c]);
  }
  Span group;
  for (std::int64_t begin = columns.begin; begin < columns.end; begin = group.end) {
    group = group_of(problem.grid.group_size, begin, columns.end);
    const T scale = scales[begin / problem.grid.group_size];
    const T inverse_scale = T(1) / scale;
    for (std::int64_t j = begin; j < group.end; ++j) {
      codes.scale[j - columns.begin] = scale;
      codes.inverse_scale[j - columns.begin] = inverse_scale;
    }
  }
  for (std::int64_t c = count; c < kPanelColumns; ++c) {
    codes.code[c] = codes.scale[c] = codes.inverse_scale[c] = T(0);
  }
}

/// A move of one column, given by its place in the panel.
template <typename T>
struct Move {
  std::int64_t at;
  T code;    // the new code
  T amount;  // t
  T change;  // of the loss
};

/// The move within a panel that lowers the loss most, the first of equals; `change` is 0 if none does.
template <typename T>
MINIQUANT_INLINE Move<T> best_move(const RefineProblem<T>& problem, const DescentArrays<T>& arrays, std::int64_t panel,
                                   const PanelCodes<T>& codes, const PanelGradient<T>& gradient) {
  const Vector<T> low = broadcast<T>(static_cast<T>(problem.grid.range.code_min));
  const Vector<T> high = broadcast<T>(static_cast<T>(problem.grid.range.code_max));
  T code[kPanelColumns];
  T amount[kPanelColumns];
  T change[kPanelColumns];
  Vector<T> least = {};
#pragma GCC unroll 16
  for (std::int64_t v = 0; v < kPanelVectors<T>; ++v) {
    const std::int64_t at = v * kLanes<T>;
    const Vector<T> diagonal = load<T>(arrays.diagonal + panel * kPanelColumns + at);
    const Vector<T> inverse_diagonal = load<T>(arrays.inverse_diagonal + panel * kPanelColumns + at);
    const Vector<T> g = gradient.value[v];
    const Vector<T> old_code = load<T>(codes.code + at);
    const Vector<T> steps = g * inverse_diagonal * load<T>(codes.inverse_scale + at);
    const Vector<T> new_code = clamp_and_round<T, Vector<T>>(old_code + steps, low, high);
    const Vector<T> t = (new_code - old_code) * load<T>(codes.scale + at);
    const Vector<T> d = t * (t * diagonal - (g + g));
    least = d < least ? d : least;
    store<T>(code + at, new_code);
    store<T>(amount + at, t);
    store<T>(change + at, d);
  }
  T lowest = T(0);
  for (std::int64_t lane = 0; lane < kLanes<T>; ++lane) {
    lowest = least[lane] < lowest ? least[lane] : lowest;
  }
  std::int64_t at = 0;
  for (; lowest < T(0) && at < kPanelColumns - 1 && change[at] != lowest; ++at) {
  }
  return {at, code[at], amount[at], lowest};
}

/// Prefetches what the visit of a row reads. It lies a page apart from the row before, so the hardware does not
/// prefetch it.
template <typename T>
MINIQUANT_INLINE void prefetch(const RefineProblem<T>& problem, const DescentArrays<T>& arrays, std::int64_t row_begin,
                               std::int64_t index, std::int64_t panel) {
  constexpr std::int64_t kLine = 64;
  const std::int64_t row = row_begin + index;
  const char* const gradient = reinterpret_cast<const char*>(gradient_at(problem, row, panel));
  const std::int64_t bytes = kPanelColumns * static_cast<std::int64_t>(sizeof(T));
#pragma GCC unroll 8
  for (std::int64_t at = 0; at < bytes; at += kLine) {
    __builtin_prefetch(gradient + at, 1);
  }
  __builtin_prefetch(problem.grid.codes + row * problem.columns + panel * kPanelColumns, 1);
  __builtin_prefetch(problem.grid.scales + row * problem.grid.groups + panel * kPanelColumns / problem.grid.group_size);
  const std::int64_t moves = index * arrays.capacity + arrays.applied[panel * arrays.rows + index];
  __builtin_prefetch(arrays.column + moves);
  __builtin_prefetch(arrays.amount + moves);
}

/// Makes the moves of a row within a panel. Returns whether there were any.
template <typename T>
MINIQUANT_INLINE bool visit(const RefineProblem<T>& problem, const DescentArrays<T>& arrays, DescentRow row,
                            std::int64_t panel) {
  const Span columns = span_of(panel * kPanelColumns, kPanelColumns, problem.columns);
  std::int8_t* const stored = problem.grid.codes + row.row * problem.columns + columns.begin;
  PanelGradient<T> gradient;
  load(gradient, gradient_at(problem, row.row, panel));
  catch_up(problem, arrays, row.index, panel, gradient);
  PanelCodes<T> codes;
  read_codes(problem, row.row, columns, codes);

  double& loss = arrays.loss[row.index];
  std::int32_t& moves = arrays.moves[row.index];
  std::int64_t made = 0;
  for (; made < kPanelColumns; ++made) {
    const Move<T> move = best_move(problem, arrays, panel, codes, gradient);
    if (!(static_cast<double>(move.change) < -kNoChange<T> * loss)) {
      break;
    }
    if (moves == arrays.capacity) {
      forget_moves(problem, arrays, row, panel);
    }
    arrays.column[row.index * arrays.capacity + moves] = static_cast<std::int32_t>(columns.begin + move.at);
    arrays.amount[row.index * arrays.capacity + moves] = move.amount;
    ++moves;
    loss += static_cast<double>(move.change);
    codes.code[move.at] = move.code;
    stored[move.at] = static_cast<std::int8_t>(static_cast<std::int32_t>(move.code));
    apply_move(problem, panel, columns.begin + move.at, move.amount, gradient);
  }
  arrays.applied[panel * arrays.rows + row.index] = moves;
  store(gradient, gradient_at(problem, row.row, panel));
  return made > 0;
}

template <typename T>
MINIQUANT_INLINE void begin_descent(const RefineProblem<T>& problem, const DescentArrays<T>& arrays,
                                    std::int64_t row_begin, std::int64_t rows) {
  const SymmetricLayout layout = {problem.columns};
  for (std::int64_t j = 0; j < layout.padded_columns(); ++j) {
    const T diagonal =
        j < problem.columns ? problem.hessian[layout.offset(j, j / kPanelColumns) + j % kPanelColumns] : T(0);
    arrays.diagonal[j] = diagonal;
    arrays.inverse_diagonal[j] = diagonal > T(0) ? T(1) / diagonal : T(0);
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    arrays.loss[i] = static_cast<double>(problem.row_loss[row_begin + i]);
    arrays.moves[i] = 0;
    arrays.idle[i] = 0;
    arrays.active[i] = static_cast<std::int32_t>(i);
  }
  for (std::int64_t i = 0; i < layout.panels() * rows; ++i) {
    arrays.applied[i] = 0;
  }
}

template <typename T>
void descend(const RefineProblem<T>& problem, std::int64_t row_begin, std::int64_t row_end, T* workspace) {
  const std::int64_t rows = row_end - row_begin;
  const std::int64_t panels = SymmetricLayout{problem.columns}.panels();
  const DescentArrays<T> arrays = lay_out_descent(problem, rows, workspace);
  begin_descent(problem, arrays, row_begin, rows);
  std::int64_t active = rows;
  for (std::int64_t round = 0; round < problem.rounds && active > 0; ++round) {
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      std::int64_t still_active = 0;
      for (std::int64_t i = 0; i < active; ++i) {
        const std::int32_t index = arrays.active[i];
        if (i + 1 < active) {
          prefetch(problem, arrays, row_begin, arrays.active[i + 1], panel);
        }
        const bool moved = visit(problem, arrays, {row_begin + index, index}, panel);
        arrays.idle[index] = moved ? 0 : arrays.idle[index] + 1;
        if (arrays.idle[index] < panels) {
          arrays.active[still_active] = index;
          ++still_active;
        }
      }
      active = still_active;
    }
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    forget_moves(problem, arrays, {row_begin + i, i}, /*up_to_date=*/-1);
    problem.row_loss[row_begin + i] = static_cast<T>(arrays.loss[i]);
  }
}

template <typename T>
std::int64_t descent_workspace(const RefineProblem<T>& problem, std::int64_t rows) {
  return lay_out_descent<T>(problem, rows, nullptr).elements;
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
