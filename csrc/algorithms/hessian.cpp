#include "algorithms/hessian.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

#include "algorithms/dispatch.h"

namespace miniquant::algorithms {
namespace {

/// Tokens summed before they are added to the Hessian: short sums added up keep float32 rounding from growing with
/// the number of tokens.
constexpr int64_t kTokensPerSum = 256;

template <typename T>
void add_products(T* hessian, int64_t columns, const T* inputs, int64_t tokens, T* tiles) {
  const auto& kernel = typed_kernels<T>();
  const int64_t column_tiles = (columns + kernel.tile_rows - 1) / kernel.tile_rows;
  for (int64_t token = 0; token < tokens; token += kTokensPerSum) {
    const int64_t count = std::min(kTokensPerSum, tokens - token);
    at::parallel_for(0, column_tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        kernel.pack_tile(inputs + token * columns, columns, count, columns, tile, tiles);
      }
    });
    for_triangle(column_tiles, [&](int64_t tile) {
      kernel.rank_update(hessian, columns, columns, tiles, count, 0, tile + 1, tile, T(1), /*mirror=*/true);
    });
  }
}

}  // namespace

void hessian_update(at::Tensor& hessian, const at::Tensor& inputs) {
  const int64_t columns = hessian.size(0);
  if (inputs.numel() == 0) {
    return;
  }
  const at::Tensor tokens = inputs.reshape({-1, columns}).to(hessian.scalar_type()).contiguous();
  const at::Tensor sum = hessian.contiguous();
  dispatch_compute(hessian.scalar_type(), [&]<typename T> {
    const int64_t lanes = typed_kernels<T>().tile_rows;
    const at::Tensor tiles = at::empty({(columns + lanes - 1) / lanes, kTokensPerSum, lanes}, sum.options());
    add_products(sum.mutable_data_ptr<T>(), columns, tokens.const_data_ptr<T>(), tokens.size(0),
                 tiles.mutable_data_ptr<T>());
  });
  if (!sum.is_same(hessian)) {
    hessian.copy_(sum);
  }
}

}  // namespace miniquant::algorithms
