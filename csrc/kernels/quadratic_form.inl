// e H e^T = sum_j e_j (2 sum_{i<j} e_i H_ij + H_jj e_j): half the products of e H, one tile of rows at a time.

template <typename T>
std::int64_t quadratic_form_workspace(const QuadraticFormProblem<T>& problem) {
  return kTileRows<T> * problem.columns;
}

template <typename T>
void quadratic_form(const QuadraticFormProblem<T>& problem, std::int64_t row_begin, std::int64_t row_end,
                    T* workspace) {
  T* const error = workspace;  // [K][lane]
  for (std::int64_t row = row_begin; row < row_end; row += kTileRows<T>) {
    const std::int64_t rows = row_end - row < kTileRows<T> ? row_end - row : kTileRows<T>;
    transpose_into_tile(problem.error + row * problem.columns, problem.columns, rows,
                        static_cast<const std::int64_t*>(nullptr), problem.columns, error);
    Vector<T> form[kVectorsPerTile] = {};
    for (std::int64_t strip = 0; strip < problem.strips; ++strip) {
      const std::int64_t first = problem.strip_begin[strip];
      const std::int64_t width = problem.strip_begin[strip + 1] - first;
      const T* const coefficient = problem.packed + problem.strip_offset[strip];
      TileAccumulator<T> sum;
      clear(sum);
      accumulate(sum, coefficient, kStripColumns, error, first);
#pragma GCC unroll 8
      for (std::int64_t c = 0; c < kStripColumns; ++c) {
        if (c < width) {
          const std::int64_t j = first + c;
          Vector<T> lanes[kVectorsPerTile];
#pragma GCC unroll 8
          for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
            lanes[v] = load<T>(error + j * kTileRows<T> + v * kLanes<T>);
            const Vector<T> diagonal = broadcast<T>(coefficient[j * kStripColumns + c]) * lanes[v];
            form[v] = multiply_add(lanes[v], sum.value[c][v] + sum.value[c][v] + diagonal, form[v]);
          }
          accumulate_row(sum, coefficient + j * kStripColumns, c + 1, lanes);
        }
      }
    }
    T result[kTileRows<T>];
    for (std::int64_t v = 0; v < kVectorsPerTile; ++v) {
      store<T>(result + v * kLanes<T>, form[v]);
    }
    for (std::int64_t lane = 0; lane < rows; ++lane) {
      problem.form[row + lane] = result[lane];
    }
  }
}
