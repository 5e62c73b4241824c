// The pieces of A = L^T L (L lower triangular), factored from the last row up; the trailing update is rank_update().

template <typename T>
std::int64_t factor_block(T* a, std::int64_t ld, std::int64_t n) {
  for (std::int64_t j = n - 1; j >= 0; --j) {
    T* const row = a + j * ld;
    if (!(row[j] > T(0))) {
      return j;
    }
    const T pivot = std::sqrt(row[j]);
    row[j] = pivot;
    for (std::int64_t i = 0; i < j; ++i) {
      row[i] /= pivot;
    }
    for (std::int64_t k = 0; k < j; ++k) {
      const T factor = row[k];
      T* const updated = a + k * ld;
      for (std::int64_t i = 0; i <= k; ++i) {
        updated[i] -= factor * row[i];
      }
    }
  }
  return -1;
}

template <typename T>
void solve_tile(const T* l, std::int64_t l_ld, std::int64_t n, T* a, std::int64_t a_ld, std::int64_t columns,
                std::int64_t tile, T* packed) {
  const std::int64_t first_column = tile * kTileRows<T>;
  const std::int64_t width = columns - first_column < kTileRows<T> ? columns - first_column : kTileRows<T>;
  // Step p solves row n - 1 - p, four steps at a time: X_j = (A_j - sum_{k>j} L_kj X_k) / L_jj. The strip's
  // coefficients are read in ascending column order, so that step p + c sits in accumulator kStripColumns - 1 - c. A
  // last, narrower strip reads up to three unused coefficients in front of its own, which lie in the row before.
  for (std::int64_t p = 0; p < n; p += kStripColumns) {
    TileAccumulator<T> sum;
    clear(sum);
    const std::int64_t lowest = n - p - kStripColumns;
    if (p > 0) {
      accumulate(sum, l + (n - 1) * l_ld + lowest, -l_ld, packed, p);
    }
    T known[kStripColumns * kTileRows<T>];
    store(sum, known, kStripColumns);
    for (std::int64_t c = 0; c < kStripColumns && p + c < n; ++c) {
      const std::int64_t j = n - 1 - (p + c);
      T* const x = packed + (p + c) * kTileRows<T>;
      const T* const sum_j = known + (kStripColumns - 1 - c) * kTileRows<T>;
      for (std::int64_t lane = 0; lane < kTileRows<T>; ++lane) {
        const T right = lane < width ? a[j * a_ld + first_column + lane] : T(0);
        T rest = right - sum_j[lane];
        for (std::int64_t earlier = 0; earlier < c; ++earlier) {
          rest -= l[(j + c - earlier) * l_ld + j] * packed[(p + earlier) * kTileRows<T> + lane];
        }
        x[lane] = rest / l[j * l_ld + j];
      }
      for (std::int64_t lane = 0; lane < width; ++lane) {
        a[j * a_ld + first_column + lane] = x[lane];
      }
    }
  }
}
