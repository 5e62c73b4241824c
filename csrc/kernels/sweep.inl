// The GPTQ sweep over a panel of rows, in the form without an inverse (docs/algorithm.md): with C[i, j] = R_ij / R_jj,
//
//   for each block of columns
//     S[block] = E[earlier blocks] C[earlier blocks, block]           the blocked product, most of the work
//     for each segment of the block                                  the block, or one group if scales are dynamic
//       scales of the group from W + S C_GG^-1                       if scales are dynamic
//       for each strip of the segment, for each column j of the strip
//         target_j = w_j + S_j + sum_{i<j, in block} E_i C_ij
//         q_j      = quantize(target_j)
//         E_j      = w_j - dequantize(q_j)
//         loss    += R_jj^2 (target_j - dequantize(q_j))^2
//
// Start reading at sweep(). Rows are the lanes of the vectors: arrays below are [tile][column][lane].

/// Columns of E whose tile stays in the first-level cache while every strip of a block passes over it.
template <typename T>
constexpr std::int64_t kDepth = 24576 / (kTileRows<T> * static_cast<std::int64_t>(sizeof(T)));

template <typename T>
constexpr std::int64_t kElementsPerDouble = 1;
template <>
constexpr std::int64_t kElementsPerDouble<float> = 2;

/// Where a panel's arrays lie in the workspace. B = max_block_columns.
template <typename T>
struct SweepArrays {
  T* error;               // [tiles][K][lane]       E
  T* sum;                 // [tiles][B][lane]       S
  T* weight;              // [tiles][B][lane]       W of the block, in the order of the sweep
  T* level;               // [B][lane]              code - zero point
  T* scale;               // [tiles][groups][lane]
  T* zero_point;          // [tiles][groups][lane]
  double* loss;           // [tiles][lane]
  std::int64_t elements;  // of the workspace, in T
};

template <typename T>
MINIQUANT_INLINE SweepArrays<T> lay_out(const SweepProblem<T>& problem, std::int64_t rows, T* workspace) {
  const std::int64_t tiles = (rows + kTileRows<T> - 1) / kTileRows<T>;
  const std::int64_t tile_columns = tiles * kTileRows<T>;
  const std::int64_t align = kVectorBytes / static_cast<std::int64_t>(sizeof(T));
  std::int64_t used = 0;
  const auto take = [&](std::int64_t count) {
    T* const at = workspace + used;
    used += (count + align - 1) / align * align;
    return at;
  };
  SweepArrays<T> arrays;
  arrays.error = take(tile_columns * problem.columns);
  arrays.sum = take(tile_columns * problem.max_block_columns);
  arrays.weight = take(tile_columns * problem.max_block_columns);
  arrays.level = take(kTileRows<T> * problem.max_block_columns);
  arrays.scale = take(tile_columns * problem.grid.groups);
  arrays.zero_point = take(tile_columns * problem.grid.groups);
  arrays.loss = reinterpret_cast<double*>(take(tile_columns * kElementsPerDouble<T>));
  arrays.elements = used;
  return arrays;
}

/// One tile of rows of the panel.
template <typename T>
struct SweepTile {
  std::int64_t row;   // first row
  std::int64_t rows;  // valid lanes
  T* error;           // [K][lane]
  T* sum;             // [B][lane], of the current block
  T* weight;          // [B][lane], of the current block
  T* level;           // [B][lane], of the current block
  T* scale;           // [groups][lane]
  T* zero_point;      // [groups][lane]
  double* loss;       // [lane]
};

template <typename T>
MINIQUANT_INLINE SweepTile<T> tile_of(const SweepProblem<T>& problem, const SweepArrays<T>& arrays,
                                      std::int64_t row_begin, std::int64_t row_end, std::int64_t tile) {
  const std::int64_t row = row_begin + tile * kTileRows<T>;
  const std::int64_t lanes = tile * kTileRows<T>;
  return {row,
          row_end - row < kTileRows<T> ? row_end - row : kTileRows<T>,
          arrays.error + lanes * problem.columns,
          arrays.sum + lanes * problem.max_block_columns,
          arrays.weight + lanes * problem.max_block_columns,
          arrays.level,
          arrays.scale + lanes * problem.grid.groups,
          arrays.zero_point + lanes * problem.grid.groups,
          arrays.loss + lanes};
}

/// Lanes past the last row get scale 1, so that they quantize their zeros to 0.
template <typename T>
MINIQUANT_INLINE void set_group_grid(const SweepProblem<T>& problem, const SweepTile<T>& tile, std::int64_t group) {
  T* const scale = tile.scale + group * kTileRows<T>;
  T* const zero_point = tile.zero_point + group * kTileRows<T>;
  for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
    const std::int64_t at = (tile.row + lane) * problem.grid.groups + group;
    scale[lane] = lane < tile.rows ? problem.grid.scales[at] : T(1);
    zero_point[lane] = lane < tile.rows ? static_cast<T>(problem.grid.zero_points[at]) : T(0);
  }
}

/// Indices [begin, end): of strips, or of columns in the order of the sweep.
struct Span {
  std::int64_t begin;
  std::int64_t end;
};

/// S[strips] += E[errors] C[errors, strips].
template <typename T>
MINIQUANT_INLINE void add_earlier_errors(const SweepProblem<T>& problem, const SweepTile<T>& tile,
                                         std::int64_t block_begin, Span strips, Span errors) {
  for (std::int64_t strip = strips.begin; strip < strips.end; ++strip) {
    const std::int64_t first = problem.strip_begin[strip];
    const std::int64_t width = problem.strip_begin[strip + 1] - first;
    T* const sum = tile.sum + (first - block_begin) * kTileRows<T>;
    TileAccumulator<T> accumulator;
    load(accumulator, sum, width);
    accumulate(accumulator, problem.packed + problem.strip_offset[strip] + errors.begin * kStripColumns, kStripColumns,
               tile.error + errors.begin * kTileRows<T>, errors.end - errors.begin);
    store(accumulator, sum, width);
  }
}

/// Scale and zero point of the group that starts at column `begin` and has the strips `strips`, from its weights as
/// updated by every earlier column: W + X with X C_GG = S. Uses the group's part of E, which is not yet set, for -X.
template <typename T>
MINIQUANT_INLINE void set_dynamic_grid(const SweepProblem<T>& problem, const SweepTile<T>& tile,
                                       std::int64_t block_begin, Span strips, std::int64_t begin) {
  Vector<T> lowest[kVectorsPerTile];
  Vector<T> highest[kVectorsPerTile];
  for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
    lowest[v] = broadcast<T>(static_cast<T>(__builtin_inf()));
    highest[v] = -lowest[v];
  }
  for (std::int64_t strip = strips.begin; strip < strips.end; ++strip) {
    const std::int64_t first = problem.strip_begin[strip];
    const std::int64_t width = problem.strip_begin[strip + 1] - first;
    const T* const coefficient = problem.packed + problem.strip_offset[strip];
    TileAccumulator<T> x;
    load(x, tile.sum + (first - block_begin) * kTileRows<T>, width);
    accumulate(x, coefficient + begin * kStripColumns, kStripColumns, tile.error + begin * kTileRows<T>, first - begin);
#pragma GCC unroll 8
    for (std::int64_t c = 0; c < kStripColumns; ++c) {
      if (c < width) {
        const std::int64_t j = first + c;
        Vector<T> minus_x[kVectorsPerTile];
#pragma GCC unroll 8
        for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
          minus_x[v] = -x.value[c][v];
          store<T>(tile.error + j * kTileRows<T> + v * kLanes<T>, minus_x[v]);
          const Vector<T> updated =
              load<T>(tile.weight + (j - block_begin) * kTileRows<T> + v * kLanes<T>) + x.value[c][v];
          lowest[v] = updated < lowest[v] ? updated : lowest[v];
          highest[v] = updated > highest[v] ? updated : highest[v];
        }
        accumulate_row(x, coefficient + j * kStripColumns, c + 1, minus_x);
      }
    }
  }
  T low[kTileRows<T>];
  T high[kTileRows<T>];
  for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
    store<T>(low + v * kLanes<T>, lowest[v]);
    store<T>(high + v * kLanes<T>, highest[v]);
  }
  const std::int64_t group = begin / problem.grid.group_size;
  for (std::int64_t lane = 0; lane < tile.rows; ++lane) {
    const std::int64_t at = (tile.row + lane) * problem.grid.groups + group;
    grid_of_range(problem.grid.range, low[lane], high[lane], problem.grid.round_scale, problem.grid.scales[at],
                  problem.grid.zero_points[at]);
  }
  set_group_grid(problem, tile, group);
}

/// Quantizes the columns of one strip; E[begin : strip) C[begin : strip), strip] is still to be added to S.
template <typename T>
MINIQUANT_INLINE void quantize_strip(const SweepProblem<T>& problem, const SweepTile<T>& tile, std::int64_t block_begin,
                                     std::int64_t strip, std::int64_t begin) {
  const std::int64_t first = problem.strip_begin[strip];
  const std::int64_t width = problem.strip_begin[strip + 1] - first;
  const T* const coefficient = problem.packed + problem.strip_offset[strip];
  TileAccumulator<T> sum;
  load(sum, tile.sum + (first - block_begin) * kTileRows<T>, width);
  accumulate(sum, coefficient + begin * kStripColumns, kStripColumns, tile.error + begin * kTileRows<T>, first - begin);

  const T code_min = static_cast<T>(problem.grid.range.code_min);
  const T code_max = static_cast<T>(problem.grid.range.code_max);
  Vector<T> loss[kVectorsPerTile] = {};
#pragma GCC unroll 8
  for (std::int64_t c = 0; c < kStripColumns; ++c) {
    if (c < width) {
      const std::int64_t j = first + c;
      const std::int64_t group = problem.column[j] / problem.grid.group_size;
      Vector<T> error[kVectorsPerTile];
#pragma GCC unroll 8
      for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
        const std::int64_t lane = v * kLanes<T>;
        const Vector<T> weight = load<T>(tile.weight + (j - block_begin) * kTileRows<T> + lane);
        const Vector<T> scale = load<T>(tile.scale + group * kTileRows<T> + lane);
        const Vector<T> zero_point = load<T>(tile.zero_point + group * kTileRows<T> + lane);
        const Vector<T> target = weight + sum.value[c][v];
        const Vector<T> level =
            round_to_level<T, Vector<T>>(target, scale, code_min - zero_point, code_max - zero_point);
        const Vector<T> dequantized = level * scale;
        error[v] = weight - dequantized;
        const Vector<T> miss = target - dequantized;
        loss[v] = multiply_add(broadcast<T>(problem.pivot_squared[j]), miss * miss, loss[v]);
        store<T>(tile.error + j * kTileRows<T> + lane, error[v]);
        store<T>(tile.level + (j - block_begin) * kTileRows<T> + lane, level);
      }
      accumulate_row(sum, coefficient + j * kStripColumns, c + 1, error);
    }
  }
  for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
    for (std::int64_t lane = 0; lane < kLanes<T>; ++lane) {
      tile.loss[v * kLanes<T> + lane] += static_cast<double>(loss[v][lane]);
    }
  }
}

/// codes[row, column] = level + zero point for the columns [begin, end) of the sweep.
template <typename T>
MINIQUANT_INLINE void write_codes(const SweepProblem<T>& problem, const SweepTile<T>& tile, std::int64_t begin,
                                  std::int64_t end) {
  for (std::int64_t lane = 0; lane < tile.rows; ++lane) {
    std::int8_t* const codes = problem.grid.codes + (tile.row + lane) * problem.columns;
    for (std::int64_t j = begin; j < end; ++j) {
      const std::int64_t column = problem.column[j];
      const std::int64_t group = column / problem.grid.group_size;
      const T code = tile.level[(j - begin) * kTileRows<T> + lane] + tile.zero_point[group * kTileRows<T> + lane];
      codes[column] = static_cast<std::int8_t>(static_cast<std::int32_t>(code));
    }
  }
}

template <typename T>
void sweep(const SweepProblem<T>& problem, std::int64_t row_begin, std::int64_t row_end, T* workspace) {
  const SweepArrays<T> arrays = lay_out(problem, row_end - row_begin, workspace);
  const std::int64_t tiles = (row_end - row_begin + kTileRows<T> - 1) / kTileRows<T>;

  for (std::int64_t t = 0; t < tiles; ++t) {
    const SweepTile<T> tile = tile_of(problem, arrays, row_begin, row_end, t);
    for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
      tile.loss[lane] = 0.0;
    }
    for (std::int64_t group = 0; !problem.dynamic_scales && group < problem.grid.groups; ++group) {
      set_group_grid(problem, tile, group);
    }
  }

  std::int64_t segment = 0;
  std::int64_t strip = 0;
  for (const std::int64_t* block = problem.block_begin; *block < problem.columns; ++block) {
    const std::int64_t block_begin = block[0];
    const std::int64_t block_end = block[1];
    const std::int64_t block_segment = segment;
    const std::int64_t block_strip = strip;
    while (problem.segment_begin[segment] < block_end) {
      ++segment;
    }
    while (problem.strip_begin[strip] < block_end) {
      ++strip;
    }

    for (std::int64_t t = 0; t < tiles; ++t) {
      const SweepTile<T> tile = tile_of(problem, arrays, row_begin, row_end, t);
      transpose_into_tile(problem.weight + tile.row * problem.columns, problem.columns, tile.rows,
                          problem.column + block_begin, block_end - block_begin, tile.weight);
      for (std::int64_t i = 0; i < (block_end - block_begin) * kTileRows<T>; ++i) {
        tile.sum[i] = T(0);
      }
    }

    for (std::int64_t begin = 0; begin < block_begin; begin += kDepth<T>) {
      const std::int64_t end = block_begin - begin < kDepth<T> ? block_begin : begin + kDepth<T>;
      for (std::int64_t t = 0; t < tiles; ++t) {
        add_earlier_errors(problem, tile_of(problem, arrays, row_begin, row_end, t), block_begin, {block_strip, strip},
                           {begin, end});
      }
    }

    for (std::int64_t t = 0; t < tiles; ++t) {
      const SweepTile<T> tile = tile_of(problem, arrays, row_begin, row_end, t);
      Span strips = {block_strip, block_strip};
      for (std::int64_t s = block_segment; s < segment; ++s) {
        const std::int64_t begin = problem.segment_begin[s];
        while (problem.strip_begin[strips.end] < problem.segment_begin[s + 1]) {
          ++strips.end;
        }
        add_earlier_errors(problem, tile, block_begin, strips, {block_begin, begin});
        if (problem.dynamic_scales) {
          set_dynamic_grid(problem, tile, block_begin, strips, begin);
        }
        for (std::int64_t i = strips.begin; i < strips.end; ++i) {
          quantize_strip(problem, tile, block_begin, i, begin);
        }
        strips.begin = strips.end;
      }
      write_codes(problem, tile, block_begin, block_end);
    }
  }

  for (std::int64_t t = 0; t < tiles; ++t) {
    const SweepTile<T> tile = tile_of(problem, arrays, row_begin, row_end, t);
    for (std::int64_t lane = 0; lane < tile.rows; ++lane) {
      problem.row_loss[tile.row + lane] = static_cast<T>(tile.loss[lane]);
    }
  }
}

template <typename T>
std::int64_t sweep_workspace(const SweepProblem<T>& problem, std::int64_t rows) {
  return lay_out<T>(problem, rows, nullptr).elements;
}
