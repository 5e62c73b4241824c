#include "algorithms/hessian.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

#include "algorithms/dispatch.h"

namespace miniquant::algorithms {
namespace {

/// Tokens per pass over the Hessian: enough that the pass costs little beside the products.
constexpr int64_t kTokensPerPass = 1024;

/// hessian += Y^T Y for one pass, inputs Y [tokens, K]; `tiles` has room for Y packed.
template <typename T>
void add_products(T* hessian, const at::Tensor& inputs, T* tiles) {
  const auto& kernel = typed_kernels<T>();
  const int64_t tokens = inputs.size(0);
  const int64_t columns = inputs.size(1);
  const T* const values = inputs.const_data_ptr<T>();
  const int64_t column_tiles = (columns + kernel.tile_rows - 1) / kernel.tile_rows;
  at::parallel_for(0, column_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      kernel.pack_tile(values, columns, tokens, columns, tile, tiles);
    }
  });
  for_triangle(column_tiles, [&](int64_t tile) {
    for (int64_t earlier = 0; earlier <= tile; ++earlier) {
      kernel.rank_update(hessian, columns, columns, tiles, tokens, earlier, tile);
    }
  });
}

}  // namespace

void hessian_update(at::Tensor& hessian, const at::Tensor& inputs) {
  const int64_t columns = hessian.size(0);
  if (inputs.numel() == 0) {
    return;
  }
  // inputs that share memory with the sum must not change while they are read
  const at::Tensor all_tokens = (inputs.is_alias_of(hessian) ? inputs.clone() : inputs).reshape({-1, columns});
  const at::Tensor sum = hessian.contiguous();
  dispatch_compute(hessian.scalar_type(), [&]<typename T> {
    const int64_t lanes = typed_kernels<T>().tile_rows;
    const int64_t pass = std::min(kTokensPerPass, all_tokens.size(0));
    const at::Tensor tiles = at::empty({(columns + lanes - 1) / lanes, pass, lanes}, sum.options());
    for (int64_t token = 0; token < all_tokens.size(0); token += pass) {
      const at::Tensor tokens = all_tokens.narrow(0, token, std::min(pass, all_tokens.size(0) - token));
      add_products(sum.mutable_data_ptr<T>(), tokens.to(sum.scalar_type()).contiguous(), tiles.mutable_data_ptr<T>());
    }
  });
  if (!sum.is_same(hessian)) {
    hessian.copy_(sum);
  }
}

}  // namespace miniquant::algorithms
