#pragma once

#include <cstdint>

#include "kernels/choices-inl.h"
#include "kernels/grid-inl.h"
#include "kernels/kernels.h"
#include "kernels/lanes-inl.h"
#include "kernels/microkernel-inl.h"
#include "kernels/sweep_tile-inl.h"

// A beam search over the columns of one row's group. The sweep's rule takes the level nearest to each target. The beam
// search keeps the kBeamWidth partial choices of least loss instead (the K-best search of sphere decoders; with a width
// of 1 it is the nearest plane):
//
//   for each column j of the group, for each choice kept
//     target_j = w_j + (S_j + sum_{i<j, in group} E_i R_ij) / R_jj
//     two choices: the level nearest to target_j, and the one on the other side of target_j
//     loss    += R_jj^2 (target_j - dequantize(level))^2
//   keep the kBeamWidth choices of least loss
//
// A job is one scale of one row. A vector holds the choices of as many jobs as it has room for, four lanes each, so
// every instruction set chooses alike. Start reading at search_beams().

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// Searches that run side by side: one computes while the others wait for their own results. Shared values lie in
/// structures of arrays, and every step below is done for one search after the other. Weights, sums and errors are in
/// units of the scale, and losses in units of its square.
template <typename T>
struct BeamSearches {
  Choices<T> scale[kBeamsAtOnce];           // of the choice
  Choices<T> low[kBeamsAtOnce];             // lowest level
  Choices<T> high[kBeamsAtOnce];            // highest level
  Choices<T> loss[kBeamsAtOnce];            // infinite where there is no choice
  Choices<T>* weight[kBeamsAtOnce];         // [B]  W
  Choices<T>* sum[kBeamsAtOnce];            // [B]  S of the columns from the current strip on
  Choices<T>* level[kBeamsAtOnce];          // [B]  level of the choices kept at each column
  ChoiceIntegers<T>* parent[kBeamsAtOnce];  // [B]  number of their parent among the choices kept before
};

/// The columns of a strip in one search.
template <typename T>
struct BeamStrip {
  Choices<T> sum[kBeamColumns];    // S of the columns not yet quantized
  Choices<T> error[kBeamColumns];  // E of those quantized, numbered as the choices were then
};

/// Quantizes column `taken` of the strip, which is column `at` of the group. `triangle` is L from the strip's first row
/// and column on.
template <typename T>
MINIQUANT_INLINE void take_column(const SweepStep<T>& step, const T* triangle, std::int64_t at, std::int64_t taken,
                                  std::int64_t width, BeamSearches<T>& searches, BeamStrip<T> (&strips)[kBeamsAtOnce]) {
  const Choices<T> inverse_pivot = for_each_choice<T>(step.inverse_pivot);
  const Choices<T> pivot_squared = for_each_choice<T>(step.pivot_squared);
  const Choices<T> impossible = for_each_choice<T>(static_cast<T>(__builtin_inf()));
  Choices<T> weight[kBeamsAtOnce];
  Choices<T> near[kBeamsAtOnce];
  Choices<T> far[kBeamsAtOnce];
  Choices<T> near_loss[kBeamsAtOnce];
  Choices<T> far_loss[kBeamsAtOnce];
  ChoiceIntegers<T> near_keys[kBeamsAtOnce];
  ChoiceIntegers<T> far_keys[kBeamsAtOnce];
#pragma GCC unroll 8
  for (std::int64_t s = 0; s < kBeamsAtOnce; ++s) {
    weight[s] = searches.weight[s][at];
    const Choices<T> target = multiply_add_choices<T>(strips[s].sum[taken], inverse_pivot, weight[s]);
    near[s] = clamp_and_round<T, Choices<T>>(target, searches.low[s], searches.high[s]);
    const Choices<T> near_miss = target - near[s];
    const Choices<T> other_side = one_with_sign_of<T>(near_miss);
    const Choices<T> far_miss = near_miss - other_side;
    far[s] = near[s] + other_side;
    near_loss[s] = multiply_add_choices<T>(pivot_squared, near_miss * near_miss, searches.loss[s]);
    far_loss[s] = multiply_add_choices<T>(pivot_squared, far_miss * far_miss, searches.loss[s]);
    far_loss[s] = far[s] > searches.high[s] ? impossible : far_loss[s];
    far_loss[s] = far[s] < searches.low[s] ? impossible : far_loss[s];
  }
#pragma GCC unroll 8
  for (std::int64_t s = 0; s < kBeamsAtOnce; ++s) {
    near_keys[s] = sort<true, T>(key_of<T>(near_loss[s], by_number<T>(0, 1, 2, 3)));
    far_keys[s] = sort<false, T>(key_of<T>(far_loss[s], by_number<T>(4, 5, 6, 7)));
  }
#pragma GCC unroll 8
  for (std::int64_t s = 0; s < kBeamsAtOnce; ++s) {
    // The four smallest of two sorted fours, one ascending and one descending.
    const ChoiceIntegers<T> kept = near_keys[s] < far_keys[s] ? near_keys[s] : far_keys[s];
    const ChoiceIntegers<T> parent = kept & (kBeamWidth - 1);
    const auto is_far = (kept & kBeamWidth) != 0;
    const Choices<T> level = is_far ? permute<T>(far[s], parent) : permute<T>(near[s], parent);
    searches.loss[s] = is_far ? permute<T>(far_loss[s], parent) : permute<T>(near_loss[s], parent);
    searches.level[s][at] = level;
    searches.parent[s][at] = parent;
    const Choices<T> error = weight[s] - level;
    strips[s].error[taken] = error;
#pragma GCC unroll 8
    for (std::int64_t c = taken + 1; c < kBeamColumns; ++c) {
      if (c < width) {
        const Choices<T> coefficient = for_each_choice<T>(triangle[c * kPanelColumns + taken]);
        strips[s].sum[c] = multiply_add_choices<T>(coefficient, error, permute<T>(strips[s].sum[c], parent));
      }
    }
  }
}

/// S of the columns after a strip of one search: += E R of the strip, for the choices kept. `parent` and `sum` are
/// those of the strip's first column and after; `triangle` is L from the strip's first row and column on.
template <typename T>
MINIQUANT_INLINE void carry_errors(const T* triangle, std::int64_t width, std::int64_t columns,
                                   const ChoiceIntegers<T>* parent, const BeamStrip<T>& strip, Choices<T>* sum) {
  // From the last column back: the ancestor of each final choice among the choices of that column.
  ChoiceIntegers<T> ancestor = by_number<T>(0, 1, 2, 3);
  Choices<T> error[kBeamColumns];
#pragma GCC unroll 8
  for (std::int64_t c = kBeamColumns - 1; c >= 0; --c) {
    error[c] = Choices<T>{};
    if (c < width) {
      error[c] = permute<T>(strip.error[c], ancestor);
      ancestor = reinterpret_cast<ChoiceIntegers<T>>(permute<T>(reinterpret_cast<Choices<T>>(parent[c]), ancestor));
    }
  }
  const auto carry = [&](std::int64_t terms) {
    for (std::int64_t j = width; j < columns; ++j) {
      const T* const coefficient = triangle + j * kPanelColumns;
      Choices<T> total = permute<T>(sum[j], ancestor);
#pragma GCC unroll 8
      for (std::int64_t c = 0; c < kBeamColumns; ++c) {
        if (c < terms) {
          total = multiply_add_choices<T>(for_each_choice<T>(coefficient[c]), error[c], total);
        }
      }
      sum[j] = total;
    }
  };
  if (width == kBeamColumns) {
    carry(kBeamColumns);
  } else {
    carry(width);
  }
}

/// Quantizes the columns of a group in all searches, which start from S in `sum`.
template <typename T>
MINIQUANT_INLINE void run_searches(const SweepProblem<T>& problem, Span columns, BeamSearches<T>& searches) {
  BeamStrip<T> strips[kBeamsAtOnce];
  Span strip;
  for (std::int64_t first = columns.begin; first < columns.end; first = strip.end) {
    strip = span_of(first, kBeamColumns - first % kBeamColumns, columns.end);
    const T* const triangle = entry(problem.triangle, {problem.columns}, first, first);
    for (std::int64_t s = 0; s < kBeamsAtOnce; ++s) {
      for (std::int64_t j = strip.begin; j < strip.end; ++j) {
        strips[s].sum[j - first] = searches.sum[s][j - columns.begin];
      }
    }
#pragma GCC unroll 8
    for (std::int64_t taken = 0; taken < kBeamColumns; ++taken) {
      if (first + taken < strip.end) {
        take_column(problem.steps[first + taken], triangle, first + taken - columns.begin, taken, strip.size(),
                    searches, strips);
      }
    }
    for (std::int64_t s = 0; s < kBeamsAtOnce; ++s) {
      const std::int64_t at = first - columns.begin;
      carry_errors(triangle, strip.size(), columns.end - first, searches.parent[s] + at, strips[s],
                   searches.sum[s] + at);
    }
  }
}

/// A scale is searched only if its nearest-plane loss is at most this many times that of the best scale: a search
/// lowers the loss by 5 to 10%.
constexpr double kWorthSearching = 1.1;

/// Max nearest-plane loss of a scale that is worth a search for row `lane` of the tile.
template <typename T>
MINIQUANT_INLINE double most_worth_searching(const KeptScales<T>& kept, std::int64_t lane) {
  return kWorthSearching * kept.loss[lane];
}

/// Whether the row has a kept scale of that number that is worth a search.
template <typename T>
MINIQUANT_INLINE bool has_scale_to_search(const KeptScales<T>& kept, std::int64_t lane, std::int64_t scale) {
  return scale < kept.count && kept.loss[scale * kTileRows<T> + lane] <= most_worth_searching(kept, lane);
}

/// A row of the tile, and the number of one of its kept scales.
struct BeamJob {
  std::int64_t lane;
  std::int64_t scale;
};

/// The place of a job: a vector, and its first lane there.
struct BeamPlace {
  std::int64_t search;
  std::int64_t choice;
};

/// Jobs that are done at once.
template <typename T>
constexpr std::int64_t kJobsAtOnce = kBeamsAtOnce * kJobsPerBeam<T>;

/// The place of the job of that number among those done at once.
template <typename T>
MINIQUANT_INLINE BeamPlace place_of(std::int64_t job) {
  return {job / kJobsPerBeam<T>, job % kJobsPerBeam<T> * kBeamWidth};
}

template <typename T>
MINIQUANT_INLINE void begin_job(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span columns, BeamJob job,
                                BeamPlace place, BeamSearches<T>& searches) {
  using Four = ShortVector<T, kBeamWidth>::unaligned;
  const auto lanes_of = [&](Choices<T>& choices) -> Four& {
    return *reinterpret_cast<Four*>(reinterpret_cast<T*>(&choices) + place.choice);
  };
  const auto set = [&](Choices<T>(&of_searches)[kBeamsAtOnce], T value) {
    lanes_of(of_searches[place.search]) = value - Four{};
  };
  const std::int64_t kept = job.scale * kTileRows<T> + job.lane;
  const T reciprocal = T(1) / tile.kept.scale[kept];
  set(searches.scale, tile.kept.scale[kept]);
  set(searches.low, static_cast<T>(problem.grid.range.code_min) - tile.kept.zero_point[kept]);
  set(searches.high, static_cast<T>(problem.grid.range.code_max) - tile.kept.zero_point[kept]);
  set(searches.loss, static_cast<T>(__builtin_inf()));
  searches.loss[place.search][place.choice] = T(0);
  const T* const weight = problem.weight + (tile.row + job.lane) * problem.columns;
  for (std::int64_t j = columns.begin; j < columns.end; ++j) {
    const std::int64_t at = j - columns.begin;
    lanes_of(searches.weight[place.search][at]) = weight[problem.steps[j].column] * reciprocal - Four{};
    lanes_of(searches.sum[place.search][at]) = sum_of(tile, j)[job.lane] * reciprocal - Four{};
  }
}

/// Replaces the quantized group of a row by a choice of a search that has ended.
template <typename T>
MINIQUANT_INLINE void take_choice(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span columns,
                                  std::int64_t row_lane, const BeamSearches<T>& searches, BeamPlace taken) {
  const T scale = searches.scale[taken.search][taken.choice];
  const T zero_point = static_cast<T>(problem.grid.range.code_min) - searches.low[taken.search][taken.choice];
  const T* const weight = problem.weight + (tile.row + row_lane) * problem.columns;
  const std::int64_t group = problem.steps[columns.begin].group * kTileRows<T> + row_lane;
  tile.scale[group] = scale;
  tile.zero_point[group] = zero_point;
  std::int64_t choice = taken.choice;
  for (std::int64_t j = columns.end - 1; j >= columns.begin; --j) {
    const T level = searches.level[taken.search][j - columns.begin][choice];
    const std::int64_t at = j * kTileRows<T> + row_lane;
    tile.error[at] = weight[problem.steps[j].column] - level * scale;
    tile.code[at] = static_cast<std::int8_t>(static_cast<std::int32_t>(level + zero_point));
    choice = choice / kBeamWidth * kBeamWidth + searches.parent[taken.search][j - columns.begin][choice];
  }
}

/// The next scale of the row, or the first of the next row.
template <typename T>
MINIQUANT_INLINE BeamJob next_job(const KeptScales<T>& kept, BeamJob job) {
  return has_scale_to_search(kept, job.lane, job.scale + 1) ? BeamJob{job.lane, job.scale + 1}
                                                            : BeamJob{job.lane + 1, 0};
}

/// Replaces the quantized group of each row by its best choice, where that loses less than `least` [lane].
template <typename T>
MINIQUANT_INLINE void take_best(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span columns,
                                const BeamJob* jobs, const BeamSearches<T>& searches, double* least) {
  for (std::int64_t first = 0; first < kJobsAtOnce<T>;) {
    const std::int64_t lane = jobs[first].lane;
    const double before = least[lane];
    BeamPlace best = {0, 0};
    std::int64_t job = first;
    for (; job < kJobsAtOnce<T> && jobs[job].lane == lane; ++job) {
      const BeamPlace place = place_of<T>(job);
      const double scale = static_cast<double>(searches.scale[place.search][place.choice]);
      for (std::int64_t choice = place.choice; choice < place.choice + kBeamWidth; ++choice) {
        const double loss = static_cast<double>(searches.loss[place.search][choice]) * scale * scale;
        if (loss < least[lane]) {
          least[lane] = loss;
          best = {place.search, choice};
        }
      }
    }
    if (least[lane] < before) {
      take_choice(problem, tile, columns, lane, searches, best);
    }
    first = job;
  }
}

/// Searches the group `columns` with all kept scales, and takes for each row the choice that adds least to its loss. On
/// entry the group is quantized to the nearest plane with the first of the kept scales.
template <typename T>
MINIQUANT_INLINE void search_beams(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span columns) {
  double least[kTileRows<T>];
  for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
    least[lane] = tile.kept.loss[lane];
  }
  BeamSearches<T> searches;
  for (std::int64_t s = 0; s < kBeamsAtOnce; ++s) {
    const std::int64_t at = s * columns.size();
    searches.weight[s] = tile.beams.weight + at;
    searches.sum[s] = tile.beams.sum + at;
    searches.level[s] = tile.beams.level + at;
    searches.parent[s] = tile.beams.parent + at;
  }
  BeamJob job = {0, 0};
  while (job.lane < tile.rows) {
    BeamJob jobs[kJobsAtOnce<T>];
    for (std::int64_t i = 0; i < kJobsAtOnce<T>; ++i) {
      // Without a job left, the job before is repeated.
      jobs[i] = job.lane < tile.rows ? job : jobs[i - 1];
      begin_job(problem, tile, columns, jobs[i], place_of<T>(i), searches);
      job = next_job(tile.kept, jobs[i]);
    }
    run_searches(problem, columns, searches);
    take_best(problem, tile, columns, jobs, searches, least);
  }
  for (std::int64_t lane = 0; lane < tile.rows; ++lane) {
    tile.loss[lane] += least[lane] - tile.kept.loss[lane];
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
