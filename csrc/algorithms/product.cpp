#include "algorithms/product.h"

#include <ATen/Context.h>

#include <algorithm>
#include <cstdint>

#include "algorithms/dispatch.h"
#include "algorithms/parallel.h"
#include "algorithms/sums_bf16.h"
#include "algorithms/tile_runs.h"
#include "kernels/bf16.h"
#include "kernels/instruction_set.h"
#include "kernels/kernels.h"

namespace miniquant::algorithms {
namespace {

/// sum += X^T Y with products in the dtype of `sum`, which is contiguous.
template <typename T>
void add_with_kernels(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
  const int64_t rows = left.size(1);
  const int64_t columns = right.size(1);
  const TileRuns<T> left_runs(rows);
  const TileRuns<T> right_runs(columns);
  const int64_t pass = std::min(kTokensPerPass, left.size(0));
  const at::Tensor left_room = left_runs.room_for(pass);
  const at::Tensor right_room = right_runs.room_for(pass);
  T* const left_tiles = left_room.mutable_data_ptr<T>();
  T* const right_tiles = right_room.mutable_data_ptr<T>();
  T* const into = sum.mutable_data_ptr<T>();
  for (int64_t token = 0; token < left.size(0); token += pass) {
    const int64_t tokens = std::min(pass, left.size(0) - token);
    const at::Tensor x = left.narrow(0, token, tokens).to(sum.scalar_type()).contiguous();
    const at::Tensor y = right.narrow(0, token, tokens).to(sum.scalar_type()).contiguous();
    for_pieces_in_turn(
        left_runs.count() + right_runs.count(),
        [&](int64_t run) {
          if (run < left_runs.count()) {
            left_runs.pack(run, x, {}, left_tiles);
          } else {
            right_runs.pack(run - left_runs.count(), y, {}, right_tiles);
          }
        },
        left_runs.count() * right_runs.count(),
        [&](int64_t block) {
          left_runs.for_tiles(block / right_runs.count(), [&](int64_t j) {
            right_runs.for_tiles(block % right_runs.count(), [&](int64_t i) {
              typed_kernels<T>().product_update(into, rows, columns, left_tiles, right_tiles, tokens, j, i);
            });
          });
        },
        tokens * rows * columns);
  }
}

/// MKL has code for AVX-512, which it runs on Intel's CPUs only, and for AVX2.
bool has_longer_vectors_than_mkl() {
#if defined(__x86_64__)
  return kernels::kernels().instruction_set == kernels::InstructionSet::kAvx512 && __builtin_cpu_is("intel") == 0;
#else
  return true;
#endif
}

}  // namespace

Multiplier fastest_multiplier(const at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
  if (prefers_bf16(kernels::bf16_kernels(), sum, left, right)) {
    return Multiplier::kBf16;
  }
  return at::hasMKL() && !has_longer_vectors_than_mkl() ? Multiplier::kAten : Multiplier::kKernels;
}

void product_update(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right, Multiplier multiplier) {
  if (left.size(0) == 0 || sum.numel() == 0) {
    return;
  }
  if (multiplier == Multiplier::kAten) {
    sum.addmm_(left.to(sum.scalar_type()).t(), right.to(sum.scalar_type()));
    return;
  }
  at::Tensor whole = sum.contiguous();
  if (multiplier == Multiplier::kBf16) {
    add_bf16_products(*kernels::bf16_kernels(), whole, left, right);
  } else {
    dispatch_compute(whole.scalar_type(), [&]<typename T> { add_with_kernels<T>(whole, left, right); });
  }
  if (!whole.is_same(sum)) {
    sum.copy_(whole);
  }
}

void product_update(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
  product_update(sum, left, right, fastest_multiplier(sum, left, right));
}

}  // namespace miniquant::algorithms
