#include "algorithms/sums_bf16.h"

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

/// Bytes of packed tiles, unless one run of tokens has more: as many as the sum has entries, so that a pass over it
/// costs little beside the products, but no more than the kernels want. Fewer stay in caches, and new memory takes
/// time.
int64_t packed_bytes(const Bf16Kernels& kernels, int64_t entries) {
  return std::clamp<int64_t>(entries * static_cast<int64_t>(sizeof(float)), kFewestPackedBytes,
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

bool has_16_bits(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

/// The number of parts that hold every bit of a 16-bit dtype.
int64_t parts_of(at::ScalarType dtype) { return dtype == at::kBFloat16 ? 1 : 2; }

Split split_of(at::ScalarType dtype, const at::Tensor& token_weights) {
  if (dtype == at::kFloat) {
    return {.left = 2, .right = 2, .exact = false};
  }
  const int64_t parts = parts_of(dtype);
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

/// Panels of a square of the sum: the most, or fewer where threads would not have several of the `squares(side)` each.
/// The sums are the same.
template <typename Squares>
int64_t square_panels(const Bf16Kernels& kernels, const Squares& squares) {
  constexpr int64_t kFewest = 8;
  constexpr int64_t kSquaresPerThread = 8;
  int64_t side = kernels.most_square_panels;
  while (side > kFewest && squares(side) < kSquaresPerThread * at::get_num_threads()) {
    side /= 2;
  }
  return side;
}

/// Squares (j, i).
using Squares = std::vector<std::pair<int64_t, int64_t>>;

/// Those of the lower triangle. Those on the diagonal are half the work, so they come last.
Squares lower_squares(int64_t count) {
  Squares squares;
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

Squares all_squares(int64_t rows, int64_t columns) {
  Squares squares;
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t i = 0; i < columns; ++i) {
      squares.emplace_back(j, i);
    }
  }
  return squares;
}

/// The tokens of one pass: [n, M or K], 16 bits or float32, and float32 weights [n], if any; contiguous.
struct Tokens {
  at::Tensor inputs;
  at::Tensor weights;

  [[nodiscard]] Bf16Layout layout() const { return {.columns = inputs.size(1), .tokens = inputs.size(0)}; }
};

Tokens tokens_of(const at::Tensor& inputs, const at::Tensor& token_weights = {}) {
  return {inputs.contiguous(), token_weights.defined() ? token_weights.to(at::kFloat).contiguous() : token_weights};
}

/// Packs a block of tokens. One of the sides may have no parts.
void pack(const Bf16Kernels& kernels, const Tokens& tokens, int64_t block, Bf16Parts left, Bf16Parts right) {
  const at::NoGradGuard no_grad;  // the caller's does not reach the threads of a team
  const Bf16Layout layout = tokens.layout();
  const float* const weights = tokens.weights.defined() ? tokens.weights.const_data_ptr<float>() : nullptr;
  const int64_t first = block * kernels::kBf16Tokens;
  const at::Tensor rows = tokens.inputs.narrow(0, first, std::min(kernels::kBf16Tokens, layout.tokens - first));
  if (rows.scalar_type() == at::kBFloat16) {
    kernels.pack_bf16(static_cast<const uint16_t*>(rows.const_data_ptr()), weights, layout, block, left, right);
  } else {
    // float16 is converted a block at a time, which stays in a cache.
    kernels.pack_f32(rows.to(at::kFloat).const_data_ptr<float>(), weights, layout, block, left, right);
  }
}

/// Room for packed tiles of both sides.
class PackedRoom {
 public:
  PackedRoom(int64_t left_elements, int64_t left_parts, int64_t right_elements, int64_t right_parts)
      : tiles_(empty_in_large_pages(left_elements * left_parts + right_elements * right_parts, at::kShort)) {
    auto* const values = static_cast<uint16_t*>(tiles_.mutable_data_ptr());
    left_ = {values, left_parts};
    right_ = {values + left_elements * left_parts, right_parts};
  }

  [[nodiscard]] Bf16Parts left() const { return left_; }
  [[nodiscard]] Bf16Parts right() const { return right_; }

 private:
  at::Tensor tiles_;
  Bf16Parts left_{};
  Bf16Parts right_{};
};

/// Runs of kTokensPerRun tokens in a pass: as many as packed tiles may take.
int64_t tokens_per_pass(const Bf16Kernels& kernels, int64_t entries, int64_t run_elements, int64_t tokens) {
  const int64_t run_bytes = run_elements * static_cast<int64_t>(sizeof(uint16_t));
  return std::min(std::max<int64_t>(packed_bytes(kernels, entries) / run_bytes, 1) * kTokensPerRun, tokens);
}

kernels::Bf16Problem problem_of(Bf16Layout left, Bf16Layout right, const PackedRoom& packed,
                                const std::vector<Bf16Product>& products, int64_t square_panels, float* sum) {
  return {.left_layout = left,
          .right_layout = right,
          .left = packed.left().values,
          .right = packed.right().values,
          .products = products.data(),
          .product_count = static_cast<int64_t>(products.size()),
          .square_panels = square_panels,
          .sum = sum};
}

/// Packs the tokens in `blocks` pieces, and then adds the products to the squares, with Bf16Kernels::add_square or
/// add_mirrored.
template <typename PackBlock>
void add_pass(const kernels::Bf16Problem& problem, int64_t blocks, const PackBlock& pack_block, const Squares& squares,
              void (*add)(const kernels::Bf16Problem&, int64_t, int64_t, float*), int64_t multiply_adds) {
  const auto square_count = static_cast<int64_t>(squares.size());
  for_pieces_in_turn(
      blocks, pack_block, square_count,
      [&, workspace = at::Tensor()](int64_t square) mutable {
        if (!workspace.defined()) {
          workspace = empty_in_large_pages(kernels::bf16_square_elements(problem.square_panels), at::kFloat);
        }
        const auto [j, i] = squares[static_cast<size_t>(square)];
        add(problem, j, i, workspace.mutable_data_ptr<float>());
      },
      multiply_adds * problem.product_count / kSpeedup);
}

void add_pass_of_squares(const Bf16Kernels& kernels, float* hessian, const Tokens& tokens, const PackedRoom& packed,
                         const std::vector<Bf16Product>& products) {
  const Bf16Layout layout = tokens.layout();
  const int64_t panels = layout.panels();
  const int64_t side =
      square_panels(kernels, [&](int64_t of_panels) { return panels * panels / (2 * of_panels * of_panels); });
  const kernels::Bf16Problem problem = problem_of(layout, layout, packed, products, side, hessian);
  add_pass(
      problem, layout.blocks(), [&](int64_t block) { pack(kernels, tokens, block, packed.left(), packed.right()); },
      lower_squares(kernels::ceil_div(panels, side)), kernels.add_mirrored,
      layout.tokens * layout.columns * layout.columns / 2);
}

void add_pass_of_products(const Bf16Kernels& kernels, float* sum, const Tokens& left, const Tokens& right,
                          const PackedRoom& packed, const std::vector<Bf16Product>& products) {
  const Bf16Layout rows = left.layout();
  const Bf16Layout columns = right.layout();
  const auto squares_along = [](const Bf16Layout& layout, int64_t side) {
    return kernels::ceil_div(layout.panels(), side);
  };
  const int64_t side =
      square_panels(kernels, [&](int64_t of) { return squares_along(rows, of) * squares_along(columns, of); });
  const kernels::Bf16Problem problem = problem_of(rows, columns, packed, products, side, sum);
  const int64_t blocks = rows.blocks();
  add_pass(
      problem, 2 * blocks,
      [&](int64_t block) {
        if (block < blocks) {
          pack(kernels, left, block, packed.left(), {});
        } else {
          pack(kernels, right, block - blocks, {}, packed.right());
        }
      },
      all_squares(squares_along(rows, side), squares_along(columns, side)), kernels.add_square,
      rows.tokens * rows.columns * columns.columns);
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
  const bool splits = has_16_bits(dtype) || (dtype == at::kFloat && precision == HessianPrecision::kBf16x3);
  return kernels != nullptr && hessian.scalar_type() == at::kFloat && splits &&
         std::ssize(products_of(split_of(dtype, token_weights))) <= kernels->most_products &&
         (!token_weights.defined() || moderate(token_weights));
}

void add_bf16_squares(const Bf16Kernels& kernels, at::Tensor& hessian, const at::Tensor& inputs,
                      const at::Tensor& token_weights) {
  const int64_t columns = inputs.size(1);
  const Split split = split_of(inputs.scalar_type(), token_weights);
  const std::vector<Bf16Product> products = products_of(split);
  const int64_t pass =
      tokens_per_pass(kernels, columns * columns,
                      Bf16Layout{columns, kTokensPerRun}.size() * (split.left + split.right), inputs.size(0));
  const int64_t part_size = Bf16Layout{columns, pass}.size();
  const PackedRoom packed(part_size, split.left, part_size, split.right);
  for (int64_t token = 0; token < inputs.size(0); token += pass) {
    const int64_t tokens = std::min(pass, inputs.size(0) - token);
    add_pass_of_squares(kernels, hessian.mutable_data_ptr<float>(),
                        tokens_of(inputs.narrow(0, token, tokens),
                                  token_weights.defined() ? token_weights.narrow(0, token, tokens) : token_weights),
                        packed, products);
  }
}

namespace {

Split split_of_factors(const at::Tensor& left, const at::Tensor& right) {
  return {parts_of(left.scalar_type()), parts_of(right.scalar_type())};
}

}  // namespace

bool prefers_bf16(const Bf16Kernels* kernels, const at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
  return kernels != nullptr && sum.scalar_type() == at::kFloat && has_16_bits(left.scalar_type()) &&
         has_16_bits(right.scalar_type()) &&
         std::ssize(products_of(split_of_factors(left, right))) <= kernels->most_products;
}

void add_bf16_products(const Bf16Kernels& kernels, at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
  const int64_t rows = left.size(1);
  const int64_t columns = right.size(1);
  const Split split = split_of_factors(left, right);
  const std::vector<Bf16Product> products = products_of(split);
  const int64_t pass = tokens_per_pass(
      kernels, rows * columns,
      Bf16Layout{rows, kTokensPerRun}.size() * split.left + Bf16Layout{columns, kTokensPerRun}.size() * split.right,
      left.size(0));
  const PackedRoom packed(Bf16Layout{rows, pass}.size(), split.left, Bf16Layout{columns, pass}.size(), split.right);
  for (int64_t token = 0; token < left.size(0); token += pass) {
    const int64_t tokens = std::min(pass, left.size(0) - token);
    add_pass_of_products(kernels, sum.mutable_data_ptr<float>(), tokens_of(left.narrow(0, token, tokens)),
                         tokens_of(right.narrow(0, token, tokens)), packed, products);
  }
}

}  // namespace miniquant::algorithms
