#include "algorithms/hessian_bf16.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <span>
#include <utility>
#include <vector>

#include "algorithms/large_pages.h"
#include "algorithms/parallel.h"
#include "kernels/arithmetic.h"

namespace miniquant::algorithms {
namespace {

using kernels::Bf16Kernels;
using kernels::Bf16Layout;
using kernels::Bf16Parts;
using kernels::Bf16Product;

constexpr int64_t kFewestPackedBytes = int64_t{4} * 1024 * 1024;

/// Bytes of packed tiles, unless one run of tokens has more: as many as the Hessian, so that a pass over it costs
/// little beside the products, but no more than the kernels want. Fewer stay in caches, and new memory takes time.
int64_t packed_bytes(const Bf16Kernels& kernels, int64_t columns) {
  return std::clamp<int64_t>(columns * columns * static_cast<int64_t>(sizeof(float)), kFewestPackedBytes,
                             kernels.most_packed_bytes);
}

/// Tokens per pass are a multiple of this, so sums in registers are long.
constexpr int64_t kTokensPerRun = 512;

/// Multiply-adds in the time of one that a float32 kernel takes.
constexpr int64_t kSpeedup = 8;

/// The number of parts of X on the left and of diag(w) X on the right, in bfloat16, that hold every bit: bfloat16 has 8
/// significant bits, float16 11, and a product with a weight, in float32, 24; with a power of two as many as without.
/// Of float32 inputs the leading 16 bits are taken, without the product of both remainders: three products.
struct Split {
  int64_t left;
  int64_t right;
  bool exact = true;
};

bool is_power_of_two(float value) {
  constexpr uint32_t kFraction = 0x007F'FFFF;
  return (std::bit_cast<uint32_t>(value) & kFraction) == 0 && std::isnormal(value);
}

bool are_powers_of_two(const at::Tensor& token_weights) {
  const at::Tensor weights = token_weights.to(at::kFloat).contiguous();
  const std::span values(weights.const_data_ptr<float>(), static_cast<size_t>(weights.numel()));
  return std::ranges::all_of(values, is_power_of_two);
}

Split split_of(at::ScalarType dtype, const at::Tensor& token_weights) {
  if (dtype == at::kFloat) {
    return {.left = 2, .right = 2, .exact = false};
  }
  const int64_t parts = dtype == at::kBFloat16 ? 1 : 2;
  return {parts, token_weights.defined() && !are_powers_of_two(token_weights) ? 3 : parts};
}

/// In an order in which adjacent products share a part, so the kernels need not load it again.
std::vector<Bf16Product> products_of(Split split) {
  std::vector<Bf16Product> products;
  for (int64_t left = 0; left < split.left; ++left) {
    for (int64_t i = 0; i < split.right; ++i) {
      const int64_t right = left % 2 == 0 ? split.right - 1 - i : i;
      if (split.exact || left == 0 || right == 0) {
        products.push_back({left, right});
      }
    }
  }
  return products;
}

/// Panels of a square of H, of `panels`: the most, or fewer where threads would not have several squares each. The sums
/// are the same.
int64_t square_panels(const Bf16Kernels& kernels, int64_t panels) {
  constexpr int64_t kFewest = 8;
  constexpr int64_t kSquaresPerThread = 8;
  int64_t side = kernels.most_square_panels;
  while (side > kFewest && panels * panels / (2 * side * side) < kSquaresPerThread * at::get_num_threads()) {
    side /= 2;
  }
  return side;
}

/// Squares (j, i) of the lower triangle. Those on the diagonal are half the work, so they come last.
std::vector<std::pair<int64_t, int64_t>> squares_of(int64_t count) {
  std::vector<std::pair<int64_t, int64_t>> squares;
  for (int64_t j = count - 1; j >= 0; --j) {
    for (int64_t i = 0; i < j; ++i) {
      squares.emplace_back(j, i);
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    squares.emplace_back(j, j);
  }
  return squares;
}

/// The tokens of one pass: X [n, K], 16 bits or float32, and float32 weights [n], if any; contiguous.
struct Tokens {
  at::Tensor inputs;
  at::Tensor weights;
};

Tokens tokens_of(const at::Tensor& inputs, const at::Tensor& token_weights) {
  return {inputs.contiguous(), token_weights.defined() ? token_weights.to(at::kFloat).contiguous() : token_weights};
}

/// Packed tiles of both sides.
struct Packed {
  Bf16Parts left;
  Bf16Parts right;
};

void pack(const Bf16Kernels& kernels, const Tokens& tokens, Bf16Layout layout, int64_t block, const Packed& packed) {
  const at::NoGradGuard no_grad;  // the caller's does not reach the threads of a team
  const float* const weights = tokens.weights.defined() ? tokens.weights.const_data_ptr<float>() : nullptr;
  const int64_t first = block * kernels::kBf16Tokens;
  const at::Tensor rows = tokens.inputs.narrow(0, first, std::min(kernels::kBf16Tokens, layout.tokens - first));
  if (rows.scalar_type() == at::kBFloat16) {
    kernels.pack_bf16(static_cast<const uint16_t*>(rows.const_data_ptr()), weights, layout, block, packed.left,
                      packed.right);
  } else {
    // float16 is converted a block at a time, which stays in a cache.
    kernels.pack_f32(rows.to(at::kFloat).const_data_ptr<float>(), weights, layout, block, packed.left, packed.right);
  }
}

void add_pass(const Bf16Kernels& kernels, float* hessian, const Tokens& tokens, const Packed& packed,
              const std::vector<Bf16Product>& products) {
  const Bf16Layout layout{.columns = tokens.inputs.size(1), .tokens = tokens.inputs.size(0)};
  const int64_t side = square_panels(kernels, layout.panels());
  const auto squares = squares_of(kernels::ceil_div(layout.panels(), side));
  const kernels::Bf16Problem problem{
      .layout = layout,
      .left = packed.left.values,
      .right = packed.right.values,
      .products = products.data(),
      .product_count = static_cast<int64_t>(products.size()),
      .square_panels = side,
      .hessian = hessian,
  };
  const auto square_count = static_cast<int64_t>(squares.size());
  const int64_t operations = layout.tokens * layout.columns * layout.columns / 2 * problem.product_count / kSpeedup;
  for_pieces_in_turn(
      layout.blocks(), [&](int64_t block) { pack(kernels, tokens, layout, block, packed); }, square_count,
      [&, workspace = at::Tensor()](int64_t square) mutable {
        if (!workspace.defined()) {
          workspace = empty_in_large_pages(kernels::bf16_square_elements(side), at::kFloat);
        }
        const auto [j, i] = squares[static_cast<size_t>(square)];
        kernels.add_square(problem, j, i, workspace.mutable_data_ptr<float>());
      },
      operations);
}

/// Weights so large or small that products with them would leave the range of float32 are for the float32 kernels,
/// which take their square roots.
bool moderate(const at::Tensor& token_weights) {
  constexpr double kSmallest = 0x1p-60;
  constexpr double kLargest = 0x1p60;
  return token_weights.ge(kSmallest).logical_and(token_weights.le(kLargest)).all().item<bool>();
}

}  // namespace

bool prefers_bf16(const Bf16Kernels* kernels, const at::Tensor& hessian, const at::Tensor& inputs,
                  const at::Tensor& token_weights, HessianPrecision precision) {
  const at::ScalarType dtype = inputs.scalar_type();
  const bool splits =
      dtype == at::kBFloat16 || dtype == at::kHalf || (dtype == at::kFloat && precision == HessianPrecision::kBf16x3);
  return kernels != nullptr && hessian.scalar_type() == at::kFloat && splits &&
         std::ssize(products_of(split_of(dtype, token_weights))) <= kernels->most_products &&
         (!token_weights.defined() || moderate(token_weights));
}

void add_bf16_products(const Bf16Kernels& kernels, at::Tensor& hessian, const at::Tensor& inputs,
                       const at::Tensor& token_weights) {
  const int64_t columns = inputs.size(1);
  const int64_t count = inputs.size(0);
  const Split split = split_of(inputs.scalar_type(), token_weights);
  const std::vector<Bf16Product> products = products_of(split);
  const int64_t run_elements = Bf16Layout{columns, kTokensPerRun}.size() * (split.left + split.right);
  const int64_t runs =
      std::max<int64_t>(packed_bytes(kernels, columns) / (run_elements * static_cast<int64_t>(sizeof(uint16_t))), 1);
  const int64_t pass = std::min(runs * kTokensPerRun, count);
  const int64_t part_size = Bf16Layout{columns, pass}.size();
  const at::Tensor tiles = empty_in_large_pages((split.left + split.right) * part_size, at::kShort);
  auto* const values = static_cast<uint16_t*>(tiles.mutable_data_ptr());
  const Packed packed{{values, split.left}, {values + split.left * part_size, split.right}};
  for (int64_t token = 0; token < count; token += pass) {
    const int64_t tokens = std::min(pass, count - token);
    add_pass(kernels, hessian.mutable_data_ptr<float>(),
             tokens_of(inputs.narrow(0, token, tokens),
                       token_weights.defined() ? token_weights.narrow(0, token, tokens) : token_weights),
             packed, products);
  }
}

}  // namespace miniquant::algorithms
