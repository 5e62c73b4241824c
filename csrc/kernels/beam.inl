// A beam search over the columns of one row's group. The sweep's rule takes the level nearest to each target; here the
// kBeamWidth partial choices of least loss are kept instead (the K-best search of sphere decoders, of which the nearest
// plane is the width of 1):
//
//   for each column j of the group, for each choice kept
//     target_j = w_j + (S_j + sum_{i<j, in group} E_i R_ij) / R_jj
//     two choices: the level nearest to target_j, and the one on its other side
//     loss    += R_jj^2 (target_j - dequantize(level))^2
//   the kBeamWidth choices of least loss are kept
//
// A vector holds the choices for as many scales as it has room for, four lanes each, so that every instruction set
// chooses alike. Start reading at search_beams().

/// One search: its scales, and the choices kept so far.
template <typename T>
struct BeamSearch {
  const T* weight;            // the row's, stored order
  Choices<T> scale;           // of the choice's search
  Choices<T> reciprocal;      // 1 / scale
  Choices<T> low;             // lowest level
  Choices<T> high;            // highest level
  Choices<T> loss;            // infinite where there is no such choice
  ChoiceIntegers<T> origin;   // the number that the choice's ancestor had before the current strip
  Choices<T>* error;          // [kBeamColumns]  E of the current strip's columns
  Choices<T>* sum;            // [B]  S of the columns from the current strip on
  Choices<T>* level;          // [B]  of the choices that were kept at each column
  ChoiceIntegers<T>* parent;  // [B]  and what number their ancestor had before it
};

/// Takes one more column. `done` of the strip's columns were taken before it.
template <typename T>
MINIQUANT_INLINE void take_column(const SweepProblem<T>& problem, std::int64_t begin, std::int64_t j, std::int64_t done,
                                  BeamSearch<T>& search) {
  const SweepStep<T>& step = problem.steps[j];
  const T* const coefficient = entry(problem.triangle, {problem.columns}, j, j - done);
  Choices<T> sum = permute<T>(search.sum[j - begin], search.origin);
#pragma GCC unroll 8
  for (std::int64_t i = 0; i < done; ++i) {
    sum = multiply_add_choices<T>(for_each_choice<T>(coefficient[i]), search.error[i], sum);
  }
  const T weight = search.weight[step.column];
  const Choices<T> target = weight + sum * step.inverse_pivot;
  const Choices<T> wanted = target * search.reciprocal;
  const Choices<T> near = clamp_and_round<T, Choices<T>>(wanted, search.low, search.high);
  const Choices<T> one = for_each_choice<T>(T(1));
  const Choices<T> far = near + (wanted > near ? one : -one);

  const Choices<T> pivot_squared = for_each_choice<T>(step.pivot_squared);
  const Choices<T> near_miss = target - near * search.scale;
  const Choices<T> far_miss = target - far * search.scale;
  const Choices<T> near_loss = multiply_add_choices<T>(pivot_squared, near_miss * near_miss, search.loss);
  const Choices<T> possible = multiply_add_choices<T>(pivot_squared, far_miss * far_miss, search.loss);
  const Choices<T> impossible = for_each_choice<T>(static_cast<T>(__builtin_inf()));
  const Choices<T> below_top = far > search.high ? impossible : possible;
  const Choices<T> far_loss = far < search.low ? impossible : below_top;

  const ChoiceIntegers<T> near_keys = sort<true, T>(key_of<T>(near_loss, by_number<T>(0, 1, 2, 3)));
  const ChoiceIntegers<T> far_keys = sort<false, T>(key_of<T>(far_loss, by_number<T>(4, 5, 6, 7)));
  const ChoiceIntegers<T> kept = near_keys < far_keys ? near_keys : far_keys;
  const ChoiceIntegers<T> parent = kept & (kBeamWidth - 1);
  const auto is_far = (kept & kBeamWidth) != 0;
  const Choices<T> level = is_far ? permute<T>(far, parent) : permute<T>(near, parent);
  search.loss = is_far ? permute<T>(far_loss, parent) : permute<T>(near_loss, parent);
  search.origin = reinterpret_cast<ChoiceIntegers<T>>(
      permute<T>(reinterpret_cast<Choices<T>>(search.origin), parent));
#pragma GCC unroll 8
  for (std::int64_t i = 0; i < done; ++i) {
    search.error[i] = permute<T>(search.error[i], parent);
  }
  search.error[done] = weight - level * search.scale;
  search.level[j - begin] = level;
  search.parent[j - begin] = parent;
}

/// S of column j, after a strip, for the choices kept: += E R of the strip's `width` columns.
template <typename T>
MINIQUANT_INLINE void carry_errors(const T* coefficient, std::int64_t width, const BeamSearch<T>& search,
                                   Choices<T>& at) {
  Choices<T> sum = permute<T>(at, search.origin);
#pragma GCC unroll 8
  for (std::int64_t i = 0; i < width; ++i) {
    sum = multiply_add_choices<T>(for_each_choice<T>(coefficient[i]), search.error[i], sum);
  }
  at = sum;
}

/// Takes the columns of a group in all searches, which begin with S in `sum`.
template <typename T>
MINIQUANT_INLINE void run_searches(const SweepProblem<T>& problem, Span columns, BeamSearch<T> (&searches)[kBeamsAtOnce]) {
  const ChoiceIntegers<T> itself = by_number<T>(0, 1, 2, 3);
  Span strip;
  for (std::int64_t first = columns.begin; first < columns.end; first = strip.end) {
    strip = span_of(first, kBeamColumns - first % kBeamColumns, columns.end);
    for (BeamSearch<T>& search : searches) {
      search.origin = itself;
    }
#pragma GCC unroll 8
    for (std::int64_t done = 0; done < kBeamColumns; ++done) {
      if (first + done < strip.end) {
        for (BeamSearch<T>& search : searches) {
          take_column(problem, columns.begin, first + done, done, search);
        }
      }
    }
    for (std::int64_t j = strip.end; j < columns.end; ++j) {
      const T* const coefficient = entry(problem.triangle, {problem.columns}, j, first);
      for (BeamSearch<T>& search : searches) {
        Choices<T>& sum = search.sum[j - columns.begin];
        if (strip.end - first == kBeamColumns) {
          carry_errors(coefficient, kBeamColumns, search, sum);
        } else {
          carry_errors(coefficient, strip.end - first, search, sum);
        }
      }
    }
  }
}

/// What a search is run for: a row of the tile, and the first of the kScalesPerBeam kept scales that it takes.
struct BeamJob {
  std::int64_t lane;
  std::int64_t first;
};

template <typename T>
MINIQUANT_INLINE void begin_search(const SweepProblem<T>& problem, const SweepTile<T>& tile, std::int64_t block_begin,
                                   Span columns, BeamJob job, BeamSearch<T>& search) {
  search.weight = problem.weight + (tile.row + job.lane) * problem.columns;
  for (std::int64_t lane = 0; lane < kBeamLanes<T>; ++lane) {
    // A scale too many is searched twice.
    const std::int64_t scale = job.first + lane / kBeamWidth;
    const std::int64_t at = (scale < tile.kept.count ? scale : job.first) * kTileRows<T> + job.lane;
    search.scale[lane] = tile.kept.scale[at];
    search.reciprocal[lane] = T(1) / tile.kept.scale[at];
    search.low[lane] = static_cast<T>(problem.grid.range.code_min) - tile.kept.zero_point[at];
    search.high[lane] = static_cast<T>(problem.grid.range.code_max) - tile.kept.zero_point[at];
    search.loss[lane] = lane % kBeamWidth == 0 ? T(0) : static_cast<T>(__builtin_inf());
  }
  for (std::int64_t j = columns.begin; j < columns.end; ++j) {
    search.sum[j - columns.begin] = for_each_choice<T>(tile.sum[(j - block_begin) * kTileRows<T> + job.lane]);
  }
}

/// Puts the choice in `from`, a lane of a search that has ended, in the place of what the row's group was quantized to.
template <typename T>
MINIQUANT_INLINE void take_choice(const SweepProblem<T>& problem, const SweepTile<T>& tile, Span columns,
                                  std::int64_t row_lane, const BeamSearch<T>& search, std::int64_t from) {
  const T scale = search.scale[from];
  const T zero_point = static_cast<T>(problem.grid.range.code_min) - search.low[from];
  const std::int64_t group = problem.steps[columns.begin].group * kTileRows<T> + row_lane;
  tile.scale[group] = scale;
  tile.zero_point[group] = zero_point;
  for (std::int64_t j = columns.end - 1; j >= columns.begin; --j) {
    const T level = search.level[j - columns.begin][from];
    const std::int64_t at = j * kTileRows<T> + row_lane;
    tile.error[at] = search.weight[problem.steps[j].column] - level * scale;
    tile.code[at] = static_cast<std::int8_t>(static_cast<std::int32_t>(level + zero_point));
    from = from / kBeamWidth * kBeamWidth + search.parent[j - columns.begin][from];
  }
}

/// Searches the group `columns`, quantized to the nearest plane with the first of the kept scales, with all of them, and
/// takes for each row what adds least to its loss.
template <typename T>
MINIQUANT_INLINE void search_beams(const SweepProblem<T>& problem, const SweepTile<T>& tile, std::int64_t block_begin,
                                   Span columns) {
  const std::int64_t searches_per_row = (tile.kept.count + kScalesPerBeam<T> - 1) / kScalesPerBeam<T>;
  const std::int64_t count = tile.rows * searches_per_row;
  double least[kTileRows<T>];
  for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
    least[lane] = tile.kept.loss[lane];
  }
  BeamSearch<T> searches[kBeamsAtOnce];
  for (std::int64_t s = 0; s < kBeamsAtOnce; ++s) {
    const std::int64_t at = s * (columns.end - columns.begin);
    searches[s].error = tile.beams.error + s * kBeamColumns;
    searches[s].sum = tile.beams.sum + at;
    searches[s].level = tile.beams.level + at;
    searches[s].parent = tile.beams.parent + at;
  }
  for (std::int64_t next = 0; next < count; next += kBeamsAtOnce) {
    BeamJob jobs[kBeamsAtOnce];
    for (std::int64_t s = 0; s < kBeamsAtOnce; ++s) {
      // A search too many is the last one again.
      const std::int64_t number = next + s < count ? next + s : count - 1;
      jobs[s] = {number / searches_per_row, number % searches_per_row * kScalesPerBeam<T>};
      begin_search(problem, tile, block_begin, columns, jobs[s], searches[s]);
    }
    run_searches(problem, columns, searches);
    for (std::int64_t s = 0; s < kBeamsAtOnce; ++s) {
      for (std::int64_t lane = 0; lane < kBeamLanes<T>; ++lane) {
        const double loss = static_cast<double>(searches[s].loss[lane]);
        if (loss < least[jobs[s].lane]) {
          tile.loss[jobs[s].lane] += loss - least[jobs[s].lane];
          least[jobs[s].lane] = loss;
          take_choice(problem, tile, columns, jobs[s].lane, searches[s], lane);
        }
      }
    }
  }
}
