#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/choices-inl.h"
#include "kernels/kernels.h"
#include "kernels/lanes-inl.h"
#include "kernels/target-inl.h"
#include "kernels/transpose-inl.h"
#include "kernels/triangle.h"
#include "kernels/vector-inl.h"

// The data of a sweep: a few tiles of rows, as lanes. Arrays are [tile][column][lane].

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// The best scales of a group for each row of a tile, by ascending loss.
template <typename T>
struct KeptScales {
  std::int64_t count;
  double* loss;   // [count][lane]  infinite where there is no scale
  T* scale;       // [count][lane]
  T* zero_point;  // [count][lane]
};

/// Empties the list. With its values, lanes past the last row quantize their zeros to 0.
template <typename T>
MINIQUANT_INLINE void clear(const KeptScales<T>& kept) {
  for (std::int64_t i = 0; i < kept.count * kTileRows<T>; ++i) {
    kept.loss[i] = __builtin_inf();
    kept.scale[i] = T(1);
    kept.zero_point[i] = T(0);
  }
}

/// Keeps a scale of row `lane` if it is among the best.
template <typename T>
MINIQUANT_INLINE void keep(const KeptScales<T>& kept, std::int64_t lane, double loss, T scale, T zero_point) {
  std::int64_t at = (kept.count - 1) * kTileRows<T> + lane;
  if (loss < kept.loss[at]) {
    for (; at >= kTileRows<T> && loss < kept.loss[at - kTileRows<T>]; at -= kTileRows<T>) {
      kept.loss[at] = kept.loss[at - kTileRows<T>];
      kept.scale[at] = kept.scale[at - kTileRows<T>];
      kept.zero_point[at] = kept.zero_point[at - kTileRows<T>];
    }
    kept.loss[at] = loss;
    kept.scale[at] = scale;
    kept.zero_point[at] = zero_point;
  }
}

/// The workspace of beam searches. G = columns of a group.
template <typename T>
struct BeamArrays {
  Choices<T>* weight;         // [kBeamsAtOnce][G]
  Choices<T>* sum;            // [kBeamsAtOnce][G]
  Choices<T>* level;          // [kBeamsAtOnce][G]
  ChoiceIntegers<T>* parent;  // [kBeamsAtOnce][G]
};

/// The arrays of a pass in the workspace. B = columns of a block.
template <typename T>
struct SweepArrays {
  T* error;            // [tiles][K][lane]       E; W for the columns not yet quantized
  T* sum;              // [tiles][B][lane]       S
  T* whitened;         // [tiles][K][lane]       E R, then E H; if a gradient is wanted
  T* scratch;          // [B][lane]              for set_dynamic_grid()
  KeptScales<T> kept;  // for one tile
  BeamArrays<T> beams;
  std::int8_t* code;      // [tiles][K][lane]
  T* scale;               // [tiles][groups][lane]
  T* zero_point;          // [tiles][groups][lane]
  double* loss;           // [tiles][lane]
  std::int64_t elements;  // in elements of T
};

template <typename T>
MINIQUANT_INLINE SweepArrays<T> lay_out(const SweepProblem<T>& problem, std::int64_t tiles, T* workspace) {
  const std::int64_t lanes = tiles * kTileRows<T>;
  const std::int64_t block = min_of(problem.block_columns, problem.columns);
  WorkspaceCutter<T> cutter = {workspace};
  SweepArrays<T> arrays = {};
  arrays.error = cutter.take(lanes * problem.columns);
  arrays.sum = cutter.take(lanes * block);
  if (problem.gradient != nullptr) {
    arrays.whitened = cutter.take(lanes * problem.columns);
  }
  if (problem.dynamic_scales) {
    arrays.scratch = cutter.take(kTileRows<T> * block);
    arrays.kept.count = problem.beam_scales > 1 ? problem.beam_scales : 1;
    const std::int64_t kept = arrays.kept.count * kTileRows<T>;
    arrays.kept.loss = reinterpret_cast<double*>(cutter.take(kept * kElementsPerDouble<T>));
    arrays.kept.scale = cutter.take(kept);
    arrays.kept.zero_point = cutter.take(kept);
  }
  if (problem.beam_scales > 0) {
    const std::int64_t choices = kBeamsAtOnce * kBeamLanes<T>;
    arrays.beams.weight = reinterpret_cast<Choices<T>*>(cutter.take(choices * problem.segment_columns));
    arrays.beams.sum = reinterpret_cast<Choices<T>*>(cutter.take(choices * problem.segment_columns));
    arrays.beams.level = reinterpret_cast<Choices<T>*>(cutter.take(choices * problem.segment_columns));
    arrays.beams.parent = reinterpret_cast<ChoiceIntegers<T>*>(cutter.take(choices * problem.segment_columns));
  }
  arrays.code =
      reinterpret_cast<std::int8_t*>(cutter.take(lanes * problem.columns / static_cast<std::int64_t>(sizeof(T)) + 1));
  arrays.scale = cutter.take(lanes * problem.grid.groups);
  arrays.zero_point = cutter.take(lanes * problem.grid.groups);
  arrays.loss = reinterpret_cast<double*>(cutter.take(lanes * kElementsPerDouble<T>));
  arrays.elements = cutter.used;
  return arrays;
}

/// One tile of rows of the pass.
template <typename T>
struct SweepTile {
  std::int64_t row;   // first row
  std::int64_t rows;  // valid lanes
  T* error;           // [K][lane]
  T* sum;             // [B][lane], for the block that begins at block_begin: sum_of()
  T* whitened;        // [K][lane]
  T* scratch;         // [B][lane], for the current group
  KeptScales<T> kept;
  BeamArrays<T> beams;
  std::int8_t* code;  // [K][lane]
  T* scale;           // [groups][lane]
  T* zero_point;      // [groups][lane]
  double* loss;       // [lane]
  std::int64_t block_begin;
};

template <typename T>
MINIQUANT_INLINE SweepTile<T> tile_of(const SweepProblem<T>& problem, const SweepArrays<T>& arrays,
                                      std::int64_t row_begin, std::int64_t row_end, std::int64_t block_begin,
                                      std::int64_t tile) {
  const std::int64_t row = row_begin + tile * kTileRows<T>;
  const std::int64_t lanes = tile * kTileRows<T>;
  const std::int64_t block = min_of(problem.block_columns, problem.columns);
  return {row,
          min_of(row_end - row, kTileRows<T>),
          arrays.error + lanes * problem.columns,
          arrays.sum + lanes * block,
          arrays.whitened + (problem.gradient != nullptr ? lanes * problem.columns : 0),
          arrays.scratch,
          arrays.kept,
          arrays.beams,
          arrays.code + lanes * problem.columns,
          arrays.scale + lanes * problem.grid.groups,
          arrays.zero_point + lanes * problem.grid.groups,
          arrays.loss + lanes,
          block_begin};
}

/// S of column j, which lies in the tile's block.
template <typename T>
MINIQUANT_INLINE T* sum_of(const SweepTile<T>& tile, std::int64_t j) {
  return column_of<T>(tile.sum, j - tile.block_begin);
}

/// Lanes past the last row get scale 1, so they quantize their zeros to 0.
template <typename T>
MINIQUANT_INLINE void set_group_grid(const SweepProblem<T>& problem, const SweepTile<T>& tile, std::int64_t group) {
  T* const scale = column_of<T>(tile.scale, group);
  T* const zero_point = column_of<T>(tile.zero_point, group);
  for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
    const std::int64_t at = (tile.row + lane) * problem.grid.groups + group;
    scale[lane] = lane < tile.rows ? problem.grid.scales[at] : T(1);
    zero_point[lane] = lane < tile.rows ? static_cast<T>(problem.grid.zero_points[at]) : T(0);
  }
}

/// Whether the columns, in the order of the sweep, are adjacent ones of W.
template <typename T>
MINIQUANT_INLINE bool are_adjacent(const SweepProblem<T>& problem, Span columns) {
  const std::int64_t first = problem.steps[columns.begin].column;
  std::int64_t others = 0;
  for (std::int64_t j = columns.begin; j < columns.end; ++j) {
    others += problem.steps[j].column == first + (j - columns.begin) ? 0 : 1;
  }
  return others == 0;
}

/// E = W, in the order of the sweep; lanes past the last row get 0.
template <typename T>
MINIQUANT_NOINLINE void read_weights(const SweepProblem<T>& problem, const SweepTile<T>& tile) {
  for (std::int64_t begin = 0; begin < problem.columns; begin += kColumnsPerCopy) {
    const Span columns = span_of(begin, kColumnsPerCopy, problem.columns);
    if (are_adjacent(problem, columns)) {
      transpose_into_tile(problem.weight + tile.row * problem.columns + problem.steps[begin].column, problem.columns,
                          tile.rows, columns.size(), column_of<T>(tile.error, begin));
      continue;
    }
    for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
      const T* const row = problem.weight + (tile.row + lane) * problem.columns;
      for (std::int64_t j = columns.begin; j < columns.end; ++j) {
        column_of<T>(tile.error, j)[lane] = lane < tile.rows ? row[problem.steps[j].column] : T(0);
      }
    }
  }
}

/// Copies the codes to their rows.
template <typename T>
MINIQUANT_NOINLINE void write_codes(const SweepProblem<T>& problem, const SweepTile<T>& tile) {
  for (std::int64_t begin = 0; begin < problem.columns; begin += kColumnsPerCopy) {
    const Span columns = span_of(begin, kColumnsPerCopy, problem.columns);
    if (are_adjacent(problem, columns)) {
      transpose(column_of<T>(tile.code, begin), kTileRows<T>, columns.size(), tile.rows,
                problem.grid.codes + tile.row * problem.columns + problem.steps[begin].column, problem.columns);
      continue;
    }
    for (std::int64_t lane = 0; lane < tile.rows; ++lane) {
      std::int8_t* const codes = problem.grid.codes + (tile.row + lane) * problem.columns;
      for (std::int64_t j = columns.begin; j < columns.end; ++j) {
        codes[problem.steps[j].column] = column_of<T>(tile.code, j)[lane];
      }
    }
  }
}

/// Copies E H, which has replaced E R, to its rows.
template <typename T>
MINIQUANT_NOINLINE void write_gradient(const SweepProblem<T>& problem, const SweepTile<T>& tile) {
  const std::int64_t padded = SymmetricLayout{problem.columns}.padded_columns();
  for (std::int64_t begin = 0; begin < problem.columns; begin += kColumnsPerCopy) {
    const Span columns = span_of(begin, kColumnsPerCopy, problem.columns);
    if (are_adjacent(problem, columns)) {
      transpose(column_of<T>(tile.whitened, begin), kTileRows<T>, columns.size(), tile.rows,
                problem.gradient + tile.row * padded + problem.steps[begin].column, padded);
      continue;
    }
    for (std::int64_t lane = 0; lane < tile.rows; ++lane) {
      T* const gradient = problem.gradient + (tile.row + lane) * padded;
      for (std::int64_t j = columns.begin; j < columns.end; ++j) {
        gradient[problem.steps[j].column] = column_of<T>(tile.whitened, j)[lane];
      }
    }
  }
  for (std::int64_t lane = 0; lane < tile.rows; ++lane) {
    for (std::int64_t j = problem.columns; j < padded; ++j) {
      problem.gradient[(tile.row + lane) * padded + j] = T(0);
    }
  }
}

/// Copies the scale and zero point of the group `columns` to their rows.
template <typename T>
MINIQUANT_INLINE void write_group_grid(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span columns) {
  const std::int64_t group = problem.steps[columns.begin].group;
  for (std::int64_t lane = 0; lane < tile.rows; ++lane) {
    const std::int64_t at = (tile.row + lane) * problem.grid.groups + group;
    problem.grid.scales[at] = column_of<T>(tile.scale, group)[lane];
    problem.grid.zero_points[at] =
        static_cast<std::int8_t>(static_cast<std::int32_t>(column_of<T>(tile.zero_point, group)[lane]));
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
