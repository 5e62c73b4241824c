#include "algorithms/hessian.h"

#include <ATen/TensorOperators.h>

#include <algorithm>
#include <cstdint>

#include "algorithms/dispatch.h"
#include "algorithms/parallel.h"
#include "algorithms/sums_bf16.h"
#include "algorithms/tile_runs.h"
#include "kernels/bf16.h"

namespace miniquant::algorithms {
namespace {

/// hessian += Y^T Y for one pass, where the rows of Y are those of inputs [tokens, K] times `factors`, as
/// TileRuns::pack() takes them; `tiles` has room for Y packed.
template <typename T>
void add_products(T* hessian, const at::Tensor& inputs, const at::Tensor& factors, T* tiles) {
  const int64_t tokens = inputs.size(0);
  const int64_t columns = inputs.size(1);
  const TileRuns<T> runs(columns);
  // The last rows of tiles are the longest, and come first.
  for_pieces_in_turn(
      runs.count(), [&](int64_t run) { runs.pack(run, inputs, factors, tiles); }, runs.count(),
      [&](int64_t run) {
        const int64_t of_long_rows = runs.count() - 1 - run;
        // Every tile that is read is multiplied by all tiles of the run while it is in a cache.
        for (int64_t earlier = 0; earlier < runs.end(of_long_rows); ++earlier) {
          runs.for_tiles(of_long_rows, [&](int64_t tile) {
            if (earlier <= tile) {
              typed_kernels<T>().rank_update(hessian, columns, columns, tiles, tokens, earlier, tile);
            }
          });
        }
      },
      tokens * columns * columns / 2);
}

/// hessian += X^T diag(w) X with products in the dtype of `hessian`, which is contiguous; inputs X [n, K].
template <typename T>
void add_in_type_of(at::Tensor& hessian, const at::Tensor& inputs, const at::Tensor& token_weights) {
  // X^T diag(w) X = Y^T Y, where the rows of Y are those of X times sqrt(w)
  const at::Tensor factors =
      token_weights.defined() ? token_weights.sqrt().to(hessian.scalar_type()).contiguous() : at::Tensor();
  const int64_t pass = std::min(kTokensPerPass, inputs.size(0));
  const at::Tensor tiles = TileRuns<T>(inputs.size(1)).room_for(pass);
  for (int64_t token = 0; token < inputs.size(0); token += pass) {
    const int64_t count = std::min(pass, inputs.size(0) - token);
    const at::Tensor tokens = inputs.narrow(0, token, count).to(hessian.scalar_type()).contiguous();
    const at::Tensor of_tokens = factors.defined() ? factors.narrow(0, token, count) : factors;
    add_products(hessian.mutable_data_ptr<T>(), tokens, of_tokens, tiles.mutable_data_ptr<T>());
  }
}

}  // namespace

void hessian_update(at::Tensor& hessian, const at::Tensor& inputs, const at::Tensor& token_weights,
                    HessianPrecision precision) {
  const int64_t columns = hessian.size(0);
  if (inputs.numel() == 0) {
    return;
  }
  // inputs that share memory with the sum must not change while they are read
  const at::Tensor all_tokens = (inputs.is_alias_of(hessian) ? inputs.clone() : inputs).reshape({-1, columns});
  at::Tensor sum = hessian.contiguous();
  if (prefers_bf16(kernels::bf16_kernels(), sum, all_tokens, token_weights, precision)) {
    add_bf16_squares(*kernels::bf16_kernels(), sum, all_tokens, token_weights);
  } else {
    dispatch_compute(sum.scalar_type(), [&]<typename T> { add_in_type_of<T>(sum, all_tokens, token_weights); });
  }
  if (!sum.is_same(hessian)) {
    hessian.copy_(sum);
  }
}

namespace {

void add_tokens(const HessianSums& state, int64_t half, const at::Tensor& inputs, const at::Tensor& token_weights,
                HessianPrecision precision) {
  at::Tensor sum = state.sums.select(0, half);
  hessian_update(sum, inputs, token_weights, precision);
  const auto count = static_cast<double>(inputs.size(0));
  auto weights = state.weights.accessor<double, 2>();
  state.tokens.accessor<int64_t, 1>()[half] += inputs.size(0);
  weights[0][half] += token_weights.defined() ? token_weights.sum().item<double>() : count;
  weights[1][half] += token_weights.defined() ? token_weights.square().sum().item<double>() : count;
}

}  // namespace

void accumulate(const HessianSums& state, const at::Tensor& inputs, const at::Tensor& token_weights,
                HessianPrecision precision) {
  if (state.tokens.size(0) == 1) {
    add_tokens(state, 0, inputs, token_weights, precision);
    return;
  }
  const auto tokens = state.tokens.accessor<int64_t, 1>();
  const int64_t lighter = tokens[0] <= tokens[1] ? 0 : 1;
  const int64_t count = inputs.size(0);
  if (count <= tokens[0] + tokens[1]) {
    add_tokens(state, lighter, inputs, token_weights, precision);
    return;
  }
  // Both halves end with the same number of tokens, or differ by one.
  const int64_t cut = (count + tokens[1 - lighter] - tokens[lighter] + 1) / 2;
  const auto part = [&](const at::Tensor& of_tokens, int64_t begin, int64_t end) {
    return of_tokens.defined() ? of_tokens.narrow(0, begin, end - begin) : of_tokens;
  };
  add_tokens(state, lighter, part(inputs, 0, cut), part(token_weights, 0, cut), precision);
  add_tokens(state, 1 - lighter, part(inputs, cut, count), part(token_weights, cut, count), precision);
}

}  // namespace miniquant::algorithms
