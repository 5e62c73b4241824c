#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/beam-inl.h"
#include "kernels/grid-inl.h"
#include "kernels/kernels.h"
#include "kernels/lanes-inl.h"
#include "kernels/microkernel-inl.h"
#include "kernels/sweep_tile-inl.h"
#include "kernels/vector-inl.h"

// The GPTQ sweep over rows, in the form without an inverse (docs/algorithm.md): with L = R^T, R_ij = L[j, i],
//
//   for each block of columns
//     S[block] = E[earlier blocks] R[earlier blocks, block]           the blocked product, most of the work
//     for each segment of the block                                  the block, or one group if scales are dynamic
//       scales of the group from W + S R_GG^-1                       if scales are dynamic
//       for each strip of the segment, for each column j of the strip
//         target_j = w_j + (S_j + sum_{i<j, in block} E_i R_ij) / R_jj
//         q_j      = quantize(target_j)
//         E_j      = w_j - dequantize(q_j)
//         loss    += R_jj^2 (target_j - dequantize(q_j))^2
//       a beam search over the codes of the group, row by row        if beam_scales > 0: beam-inl.h
//   E H = (E R) R^T                                                  if a gradient is wanted
//
// Start reading at sweep(). Rows are the lanes of the vectors: arrays below are [tile][column][lane].

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

template <typename T>
MINIQUANT_INLINE void clear_sums(const SweepTile<T>& tile, Span block) {
  for (std::int64_t i = 0; i < block.size() * kTileRows<T>; ++i) {
    tile.sum[i] = T(0);
  }
}

/// S[columns] += E[errors] R[errors, columns].
template <typename T>
MINIQUANT_INLINE void add_earlier_errors(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span columns,
                                         Span errors, const Upcoming& upcoming) {
  Fetcher fetcher(upcoming);
  for (std::int64_t first = columns.begin; first < columns.end; first += kStripColumns) {
    const Span strip = span_of(first, kStripColumns, columns.end);
    T* const sum = sum_of(tile, first);
    TileAccumulator<T> accumulator;
    load(accumulator, sum, kTileRows<T>, strip.size());
    FetchLines lines = fetcher.take(errors.size());
    accumulate_rows_of(problem.triangle, {problem.columns}, first, errors.begin, errors.end,
                       column_of<T>(tile.error, errors.begin), accumulator, lines);
    store(accumulator, sum, kTileRows<T>, strip.size());
  }
}

/// S[block] = E[earlier blocks] R[earlier blocks, block], for all tiles of a pass.
template <typename T>
MINIQUANT_INLINE void add_errors_of_earlier_blocks(const SweepProblem<T>& problem, const SweepArrays<T>& arrays,
                                                   Span rows, std::int64_t tiles, Span block) {
  const auto tile = [&](std::int64_t t) { return tile_of(problem, arrays, rows.begin, rows.end, block.begin, t); };
  for (std::int64_t t = 0; t < tiles; ++t) {
    clear_sums(tile(t), block);
  }
  for (std::int64_t earlier = 0; earlier < block.begin; earlier += kDepth<T>) {
    const Span errors = span_of(earlier, kDepth<T>, block.begin);
    const Span next = span_of(errors.end, kDepth<T>, block.begin);
    for (std::int64_t t = 0; t < tiles; ++t) {
      Upcoming upcoming = {};
      if (t + 1 < tiles) {
        add_columns<T>(upcoming, tile(t + 1).error, errors);
      } else {
        add_columns<T>(upcoming, tile(0).error, next);
        add_rows(upcoming, problem.triangle, TriangleLayout{problem.columns}, block, next);
      }
      add_earlier_errors(problem, tile(t), block, errors, upcoming);
    }
  }
}

/// The arrays for the quantized columns of a segment, each from the segment's first column on.
template <typename T>
struct QuantizedSegment {
  T* error;                       // [columns][lane]
  double* loss;                   // [lane], added to
  std::int8_t* code = nullptr;    // [columns][lane]; null in a trial
  const T* scale = nullptr;       // [lane] in a trial; otherwise the grid of the tile is read
  const T* reciprocal = nullptr;  // [lane] in a trial: 1 / scale
  const T* zero_point = nullptr;  // [lane] in a trial
};

/// Quantizes the columns of one strip of the segment that begins at `begin`, after adding the segment's earlier errors
/// to S. A trial needs only the loss, and multiplies by a reciprocal: a tie may round the other way, with the same
/// loss.
template <bool kTrial, typename T>
MINIQUANT_INLINE void quantize_strip(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span strip,
                                     std::int64_t begin, const QuantizedSegment<T>& to) {
  TileAccumulator<T> sum;
  load(sum, sum_of(tile, strip.begin), kTileRows<T>, strip.size());
  accumulate_rows_of(problem.triangle, {problem.columns}, strip.begin, begin, strip.begin, to.error, sum);

  const T code_min = static_cast<T>(problem.grid.range.code_min);
  const T code_max = static_cast<T>(problem.grid.range.code_max);
  Vector<T> loss[kVectorsPerTile] = {};
#pragma GCC unroll 8
  for (std::int64_t c = 0; c < kStripColumns; ++c) {
    const std::int64_t j = strip.begin + c;
    if (j < strip.end) {
      const SweepStep<T>& step = problem.steps[j];
      Vector<T> error[kVectorsPerTile];
#pragma GCC unroll 8
      for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
        const std::int64_t lane = v * kLanes<T>;
        const Vector<T> weight = load<T>(column_of<T>(tile.error, j) + lane);
        const std::int64_t of_group = step.group * kTileRows<T> + lane;
        const Vector<T> scale = load<T>(kTrial ? to.scale + lane : tile.scale + of_group);
        const Vector<T> zero_point = load<T>(kTrial ? to.zero_point + lane : tile.zero_point + of_group);
        const Vector<T> low = code_min - zero_point;
        const Vector<T> high = code_max - zero_point;
        const Vector<T> target = weight + sum.value[c][v] * step.inverse_pivot;
        const Vector<T> level = kTrial
                                    ? clamp_and_round<T, Vector<T>>(target * load<T>(to.reciprocal + lane), low, high)
                                    : round_to_level<T, Vector<T>>(target, scale, low, high);
        const Vector<T> dequantized = level * scale;
        error[v] = weight - dequantized;
        const Vector<T> miss = target - dequantized;
        loss[v] = multiply_add(broadcast<T>(step.pivot_squared), miss * miss, loss[v]);
        store<T>(column_of<T>(to.error, j - begin) + lane, error[v]);
        if constexpr (!kTrial) {
          store_codes(column_of<T>(to.code, j - begin) + lane, level + zero_point);
        }
      }
      accumulate_term(sum, entry(problem.triangle, {problem.columns}, strip.begin, j), kPanelColumns, error, c + 1,
                      kStripColumns);
    }
    if (c % kColumnsPerLoss == kColumnsPerLoss - 1) {
      add_loss<T>(loss, to.loss);
    }
  }
}

/// Quantizes the columns of a segment with the grid of `tile`.
template <typename T>
MINIQUANT_INLINE void quantize_segment(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span segment,
                                       const QuantizedSegment<T>& to) {
  for (std::int64_t first = segment.begin; first < segment.end; first += kStripColumns) {
    quantize_strip<false>(problem, tile, span_of(first, kStripColumns, segment.end), segment.begin, to);
  }
}

/// The range of the group `columns` in its weights as updated by every earlier column: W + X with X R_GG = S.
template <typename T>
MINIQUANT_INLINE void range_of_group(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span columns, T* low,
                                     T* high) {
  Vector<T> lowest[kVectorsPerTile];
  Vector<T> highest[kVectorsPerTile];
  for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
    lowest[v] = broadcast<T>(static_cast<T>(__builtin_inf()));
    highest[v] = -lowest[v];
  }
  for (std::int64_t first = columns.begin; first < columns.end; first += kStripColumns) {
    const Span strip = span_of(first, kStripColumns, columns.end);
    TileAccumulator<T> sum;
    load(sum, sum_of(tile, first), kTileRows<T>, strip.size());
    accumulate_rows_of(problem.triangle, {problem.columns}, first, columns.begin, first, tile.scratch, sum);
#pragma GCC unroll 8
    for (std::int64_t c = 0; c < kStripColumns; ++c) {
      const std::int64_t j = first + c;
      if (j < strip.end) {
        Vector<T> minus_x[kVectorsPerTile];
#pragma GCC unroll 8
        for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
          const Vector<T> x = sum.value[c][v] * problem.steps[j].inverse_pivot;
          minus_x[v] = -x;
          store<T>(column_of<T>(tile.scratch, j - columns.begin) + v * kLanes<T>, minus_x[v]);
          const Vector<T> updated = load<T>(column_of<T>(tile.error, j) + v * kLanes<T>) + x;
          lowest[v] = updated < lowest[v] ? updated : lowest[v];
          highest[v] = updated > highest[v] ? updated : highest[v];
        }
        accumulate_term(sum, entry(problem.triangle, {problem.columns}, first, j), kPanelColumns, minus_x, c + 1,
                        kStripColumns);
      }
    }
  }
  for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
    store<T>(low + v * kLanes<T>, lowest[v]);
    store<T>(high + v * kLanes<T>, highest[v]);
  }
}

/// bound[lane] = max loss at which row `lane` can use a scale: it beats the last kept scale and is worth a search.
template <typename T>
MINIQUANT_INLINE void set_bounds(const SweepTile<T>& tile, double* bound) {
  const double* const last = column_of<T>(tile.kept.loss, tile.kept.count - 1);
  for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
    const double worth = most_worth_searching(tile.kept, lane);
    const double most = last[lane] < worth ? last[lane] : worth;
    bound[lane] = lane < tile.rows ? most : 0.0;
  }
}

/// Whether no row of the tile can use a scale with that loss.
template <typename T>
MINIQUANT_INLINE bool lost(const double* loss, const double* bound) {
  std::int64_t useful = 0;
  for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
    useful += loss[lane] < bound[lane] ? 1 : 0;
  }
  return useful == 0;
}

/// Of the scales for the problem's factors, keeps those with which the group's columns add least to the loss. That sum
/// is the whole cost of a scale: the sweep corrects later columns for any error.
template <typename T>
MINIQUANT_INLINE void try_scales(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span columns, const T* low,
                                 const T* high) {
  clear(tile.kept);
  const std::int64_t group = problem.steps[columns.begin].group;
  for (std::int64_t factor = 0; factor < problem.search.factor_count; ++factor) {
    double loss[kTileRows<T>] = {};
    double bound[kTileRows<T>];
    T scale[kTileRows<T>];
    T reciprocal[kTileRows<T>];
    T zero_point[kTileRows<T>];
    std::int8_t stored_zero_point[kTileRows<T>];
    for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
      scale[lane] = T(1);
      stored_zero_point[lane] = 0;
      if (lane < tile.rows) {
        grid_of_scaled_range(problem.grid.range, low[lane], high[lane], problem.search.factors[factor],
                             held_range(problem.grid, tile.row + lane, group),
                             scales_of_row(problem.grid, tile.row + lane), scale[lane], stored_zero_point[lane]);
      }
      reciprocal[lane] = T(1) / scale[lane];
      zero_point[lane] = static_cast<T>(stored_zero_point[lane]);
    }
    const QuantizedSegment<T> trial = {
        .error = tile.scratch, .loss = loss, .scale = scale, .reciprocal = reciprocal, .zero_point = zero_point};
    // A column never lowers the loss, so a trial ends once no row can use its scale.
    set_bounds(tile, bound);
    for (std::int64_t first = columns.begin; first < columns.end && !lost<T>(loss, bound); first += kStripColumns) {
      quantize_strip<true>(problem, tile, span_of(first, kStripColumns, columns.end), columns.begin, trial);
    }
    for (std::int64_t lane = 0; lane < tile.rows; ++lane) {
      keep(tile.kept, lane, loss[lane], scale[lane], zero_point[lane]);
    }
  }
}

/// Scale and zero point of the group `columns`, from its updated weights.
template <typename T>
MINIQUANT_INLINE void set_dynamic_grid(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span columns) {
  T low[kTileRows<T>];
  T high[kTileRows<T>];
  range_of_group(problem, tile, columns, low, high);
  try_scales(problem, tile, columns, low, high);
  const std::int64_t group = problem.steps[columns.begin].group;
  for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
    column_of<T>(tile.scale, group)[lane] = tile.kept.scale[lane];
    column_of<T>(tile.zero_point, group)[lane] = tile.kept.zero_point[lane];
  }
}

/// (E R)[segment] = S + E[segment] R[segment, segment]; 0 for a column without inputs, whose pivot is a stand-in for 0.
template <typename T>
MINIQUANT_INLINE void whiten_errors(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span segment) {
  for (std::int64_t first = segment.begin; first < segment.end; first += kStripColumns) {
    const Span strip = span_of(first, kStripColumns, segment.end);
    TileAccumulator<T> sum;
    load(sum, sum_of(tile, first), kTileRows<T>, strip.size());
    accumulate_rows_of(problem.triangle, {problem.columns}, first, segment.begin, first,
                       column_of<T>(tile.error, segment.begin), sum);
#pragma GCC unroll 8
    for (std::int64_t c = 0; c < kStripColumns; ++c) {
      const std::int64_t j = first + c;
      if (j < strip.end) {
        Vector<T> error[kVectorsPerTile];
        load_lanes<T>(column_of<T>(tile.error, j), error);
        accumulate_term(sum, entry(problem.triangle, {problem.columns}, first, j), kPanelColumns, error, c,
                        kStripColumns);
      }
    }
    store(sum, column_of<T>(tile.whitened, first), kTileRows<T>, strip.size());
  }
  for (std::int64_t j = segment.begin; j < segment.end; ++j) {
    for (std::int64_t lane = 0; problem.steps[j].pivot_squared == T(0) && lane < kTileRows<T>; ++lane) {
      column_of<T>(tile.whitened, j)[lane] = T(0);
    }
  }
}

/// tile.sum += (E R)[terms] R[columns, terms]^T, without terms before the column. `terms` is the block or lies after
/// it.
template <typename T>
MINIQUANT_INLINE void add_later_terms(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span block, Span terms,
                                      const Upcoming& upcoming) {
  Fetcher fetcher(upcoming);
  const TriangleLayout layout = {problem.columns};
  const T* const whitened = tile.whitened;
  Span strip;
  for (std::int64_t first = block.begin; first < block.end; first = strip.end) {
    strip = strip_of(first, block.end);
    T* const sum = sum_of(tile, first);
    TileAccumulator<T> accumulator;
    load(accumulator, sum, kTileRows<T>, strip.size());
    const bool within = terms.begin < block.end;
    if (within) {
#pragma GCC unroll 8
      for (std::int64_t c = 0; c < kStripColumns; ++c) {
        const std::int64_t k = first + c;
        if (k < strip.end) {
          Vector<T> lanes[kVectorsPerTile];
          load_lanes<T>(column_of<T>(whitened, k), lanes);
          accumulate_term(accumulator, entry(problem.triangle, layout, k, first), 1, lanes, 0, c + 1);
        }
      }
    }
    const std::int64_t begin = within ? strip.end : terms.begin;
    FetchLines lines = fetcher.take(terms.end - begin);
    accumulate_columns_of(problem.triangle, layout, first, begin, terms.end, column_of<T>(whitened, begin), accumulator,
                          lines);
    store(accumulator, sum, kTileRows<T>, strip.size());
  }
}

/// Replaces E R by E H = (E R) R^T, block by block in ascending order: a block needs E R only from its own columns on.
template <typename T>
MINIQUANT_INLINE void set_gradient(const SweepProblem<T>& problem, const SweepArrays<T>& arrays, std::int64_t row_begin,
                                   std::int64_t row_end, std::int64_t tiles) {
  Span block;
  for (std::int64_t begin = 0; begin < problem.columns; begin = block.end) {
    block = span_of(begin, problem.block_columns, problem.columns);
    const auto tile = [&](std::int64_t t) { return tile_of(problem, arrays, row_begin, row_end, block.begin, t); };
    for (std::int64_t t = 0; t < tiles; ++t) {
      clear_sums(tile(t), block);
      add_later_terms(problem, tile(t), block, block, Upcoming{});
    }
    Span terms;
    for (std::int64_t first = block.end; first < problem.columns; first = terms.end) {
      terms = span_of(first, kDepth<T>, problem.columns);
      const Span next = span_of(terms.end, kDepth<T>, problem.columns);
      for (std::int64_t t = 0; t < tiles; ++t) {
        Upcoming upcoming = {};
        if (t + 1 < tiles) {
          add_columns<T>(upcoming, tile(t + 1).whitened, terms);
        } else {
          add_columns<T>(upcoming, tile(0).whitened, next);
          add_rows(upcoming, problem.triangle, TriangleLayout{problem.columns}, next, block);
        }
        add_later_terms(problem, tile(t), block, terms, upcoming);
      }
    }
    for (std::int64_t t = 0; t < tiles; ++t) {
      const SweepTile<T> of_rows = tile(t);
      for (std::int64_t i = 0; i < block.size() * kTileRows<T>; ++i) {
        column_of<T>(of_rows.whitened, block.begin)[i] = of_rows.sum[i];
      }
    }
  }
}

/// Quantizes a block; on entry its S holds the contribution of earlier blocks.
template <typename T>
MINIQUANT_INLINE void quantize_block(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span block) {
  Span segment;
  for (std::int64_t begin = block.begin; begin < block.end; begin = segment.end) {
    segment = span_of(begin, problem.segment_columns, block.end);
    add_earlier_errors(problem, tile, segment, {block.begin, begin}, Upcoming{});
    if (problem.dynamic_scales) {
      set_dynamic_grid(problem, tile, segment);
    }
    quantize_segment(
        problem, tile, segment,
        {.error = column_of<T>(tile.error, begin), .loss = tile.loss, .code = column_of<T>(tile.code, begin)});
    if (problem.beam_scales > 0) {
      search_beams(problem, tile, segment);
    }
    if (problem.gradient != nullptr) {
      whiten_errors(problem, tile, segment);
    }
    if (problem.dynamic_scales) {
      write_group_grid(problem, tile, segment);
    }
  }
}

/// Quantizes rows [row_begin, row_end), at most kTilesPerPass tiles of them.
template <typename T>
MINIQUANT_INLINE void sweep_tiles(const SweepProblem<T>& problem, std::int64_t row_begin, std::int64_t row_end,
                                  T* workspace) {
  const std::int64_t tiles = ceil_div(row_end - row_begin, kTileRows<T>);
  const SweepArrays<T> arrays = lay_out(problem, tiles, workspace);

  for (std::int64_t t = 0; t < tiles; ++t) {
    const SweepTile<T> tile = tile_of(problem, arrays, row_begin, row_end, 0, t);
    for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
      tile.loss[lane] = 0.0;
    }
    read_weights(problem, tile);
    for (std::int64_t group = 0; !problem.dynamic_scales && group < problem.grid.groups; ++group) {
      set_group_grid(problem, tile, group);
    }
  }

  Span block;
  for (std::int64_t begin = 0; begin < problem.columns; begin = block.end) {
    block = span_of(begin, problem.block_columns, problem.columns);
    add_errors_of_earlier_blocks(problem, arrays, {row_begin, row_end}, tiles, block);
    for (std::int64_t t = 0; t < tiles; ++t) {
      quantize_block(problem, tile_of(problem, arrays, row_begin, row_end, begin, t), block);
    }
  }

  if (problem.gradient != nullptr) {
    set_gradient(problem, arrays, row_begin, row_end, tiles);
  }
  for (std::int64_t t = 0; t < tiles; ++t) {
    const SweepTile<T> tile = tile_of(problem, arrays, row_begin, row_end, 0, t);
    write_codes(problem, tile);
    if (problem.gradient != nullptr) {
      write_gradient(problem, tile);
    }
    for (std::int64_t lane = 0; lane < tile.rows; ++lane) {
      problem.row_loss[tile.row + lane] = static_cast<T>(tile.loss[lane]);
    }
  }
}

template <typename T>
void sweep(const SweepProblem<T>& problem, std::int64_t row_begin, std::int64_t row_end, T* workspace) {
  constexpr std::int64_t kRowsPerPass = kTilesPerPass * kTileRows<T>;
  for (std::int64_t row = row_begin; row < row_end; row += kRowsPerPass) {
    sweep_tiles(problem, row, min_of(row_end, row + kRowsPerPass), workspace);
  }
}

template <typename T>
std::int64_t sweep_workspace(const SweepProblem<T>& problem, std::int64_t rows) {
  const std::int64_t tiles = ceil_div(rows, kTileRows<T>);
  return lay_out<T>(problem, min_of(tiles, kTilesPerPass), nullptr).elements;
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
