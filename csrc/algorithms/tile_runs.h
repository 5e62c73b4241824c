#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "algorithms/dispatch.h"
#include "algorithms/large_pages.h"
#include "kernels/arithmetic.h"

// Tokens as the kernels of sums of products read them: packed in tiles of columns.

namespace miniquant::algorithms {

/// Tokens per pass over a sum: enough to make the cost of the pass small beside the products.
inline constexpr int64_t kTokensPerPass = 1024;

/// The tiles of a matrix's columns, in runs of adjacent tiles that one thread takes: two threads would otherwise fetch
/// the same pairs of cache lines.
template <typename T>
class TileRuns {
 public:
  explicit TileRuns(int64_t columns)
      : columns_(columns), tiles_(kernels::ceil_div(columns, typed_kernels<T>().tile_rows)) {}

  [[nodiscard]] int64_t count() const { return kernels::ceil_div(tiles_, kTilesPerRun); }

  /// The tile after the last of a run.
  [[nodiscard]] int64_t end(int64_t run) const { return std::min(tiles_, (run + 1) * kTilesPerRun); }

  /// body(tile) for the tiles of one run.
  template <typename Body>
  void for_tiles(int64_t run, const Body& body) const {
    for (int64_t tile = run * kTilesPerRun; tile < end(run); ++tile) {
      body(tile);
    }
  }

  /// Memory for the packed columns of so many tokens.
  [[nodiscard]] at::Tensor room_for(int64_t tokens) const {
    return empty_in_large_pages(tiles_ * tokens * typed_kernels<T>().tile_rows, c10::CppTypeToScalarType<T>::value);
  }

  /// Packs one run of `values` [tokens, columns], each token times its factor; `factors` [tokens], or undefined for 1
  /// each. Both contiguous.
  void pack(int64_t run, const at::Tensor& values, const at::Tensor& factors, T* packed) const {
    const kernels::ScaledRows<T> from{
        .rows = values.const_data_ptr<T>(),
        .ld = columns_,
        .count = values.size(0),
        .columns = columns_,
        .factors = factors.defined() ? factors.const_data_ptr<T>() : nullptr,
    };
    for_tiles(run, [&](int64_t tile) { typed_kernels<T>().pack_tile(from, tile, packed); });
  }

 private:
  static constexpr int64_t kTilesPerRun = 4;

  int64_t columns_;
  int64_t tiles_;
};

}  // namespace miniquant::algorithms
