#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/instruction_set.h"

// The kernels of H += X^T X, and of S += X^T Y, for inputs of 16 bits, with instructions that multiply bfloat16 values
// exactly and sum in float32. Values with more bits are sums of parts, which are bfloat16 values:
//
//   S += sum over products (l, r) of left_l^T right_r     left_l [tokens, M], right_r [tokens, K]
//
// bfloat16 inputs are one part, so one product. float16 inputs are two, so four products. Weighted tokens are on the
// right, as many parts as without weights where these are powers of two. Of a symmetric sum only the lower triangle is
// computed.
//
// Every entry is a sum in an order that depends on the tokens and products only, not on how the caller splits the work.

namespace miniquant::kernels {

/// A packed tile holds kBf16Tokens tokens of kBf16Columns columns:
///   on the left   [column][token]
///   on the right  [pair of tokens][column][2], the two tokens of a pair side by side
inline constexpr std::int64_t kBf16Columns = 16;
inline constexpr std::int64_t kBf16Tokens = 32;
inline constexpr std::int64_t kBf16TileElements = kBf16Columns * kBf16Tokens;

/// Blocks of tokens per run: two right panels of so many fill most of the first-level cache while the left panels of a
/// square pass by.
inline constexpr std::int64_t kBf16RunBlocks = 16;

/// The packed tiles of one part: [run][panel][block], a panel for kBf16Columns columns, a block for kBf16Tokens tokens.
/// A run is kBf16RunBlocks blocks, the last what is left: what a square reads at a time lies together, so it does not
/// evict itself from the caches. The number of panels is even. Tokens and columns past the last are 0.
struct Bf16Layout {
  std::int64_t columns;  ///< M on the left, K on the right
  std::int64_t tokens;

  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t panels() const {
    return 2 * ceil_div(columns, 2 * kBf16Columns);
  }
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t blocks() const { return ceil_div(tokens, kBf16Tokens); }
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t size() const {
    return panels() * blocks() * kBf16TileElements;
  }
  /// The number of blocks of the run that begins at `block`.
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t run_blocks(std::int64_t block) const {
    return min_of(blocks() - block, kBf16RunBlocks);
  }
  [[nodiscard]] [[gnu::always_inline]] constexpr std::int64_t offset(std::int64_t panel, std::int64_t block) const {
    const std::int64_t in_run = block % kBf16RunBlocks;
    return ((block - in_run) * panels() + panel * run_blocks(block - in_run) + in_run) * kBf16TileElements;
  }
};

/// Packed parts, [count][Bf16Layout::size()], aligned to 64 bytes.
struct Bf16Parts {
  std::uint16_t* values;
  std::int64_t count;
};

/// left_l^T right_r.
struct Bf16Product {
  std::int64_t left;
  std::int64_t right;
};

/// Elements of the sums of a square of S, of so many panels.
constexpr std::int64_t bf16_square_elements(std::int64_t panels) {
  return panels * panels * kBf16Columns * kBf16Columns;
}

struct Bf16Problem {
  Bf16Layout left_layout;
  Bf16Layout right_layout;    ///< of as many tokens
  const std::uint16_t* left;  ///< parts as in Bf16Parts
  const std::uint16_t* right;
  const Bf16Product* products;  ///< best in an order in which adjacent ones share a part
  std::int64_t product_count;
  std::int64_t square_panels;  ///< panels of a square of S; even, at most most_square_panels of the kernels
  float* sum;                  ///< [M, K]
};

struct Bf16Kernels {
  const char* name;

  /// The number of products up to which these kernels are faster than those for float32.
  std::int64_t most_products;

  /// Bytes of packed tiles at most. The faster the products, the more a pass over the sum costs beside them.
  std::int64_t most_packed_bytes;

  /// Panels of a square of S at most, so that its sums and what is multiplied at a time fit the second-level cache.
  std::int64_t most_square_panels;

  /// Splits the tokens of a block, rows [up to kBf16Tokens, K], and packs the parts, the first with the leading bits.
  /// The last part is cut off: a bfloat16 value is one part, float16 values two, float32 values three. On the right are
  /// the tokens times weights [tokens], in float32; `weights` may be null. One side may have no parts, without weights.
  void (*pack_bf16)(const std::uint16_t* rows, const float* weights, Bf16Layout layout, std::int64_t block,
                    Bf16Parts left, Bf16Parts right);
  void (*pack_f32)(const float* rows, const float* weights, Bf16Layout layout, std::int64_t block, Bf16Parts left,
                   Bf16Parts right);

  /// Adds the products to a square of S: rows from panel j * square_panels on, columns from panel i * square_panels on.
  /// `workspace` has bf16_square_elements(square_panels) elements and is aligned to 64 bytes.
  void (*add_square)(const Bf16Problem& problem, std::int64_t j, std::int64_t i, float* workspace);

  /// The same of a symmetric sum, i <= j, and to the mirror image of the square.
  void (*add_mirrored)(const Bf16Problem& problem, std::int64_t j, std::int64_t i, float* workspace);
};

/// The kernels of one unit, which this CPU must support and which is not kNone.
const Bf16Kernels& bf16_kernels_for(Bf16Unit unit);

/// The kernels of choose_bf16_unit(), chosen once; null where it is kNone.
const Bf16Kernels* bf16_kernels();

/// The unit of bf16_kernels().
Bf16Unit bf16_unit();

/// The same kernels with the instruction in C++: for tests, on any CPU.
extern const Bf16Kernels bf16_kernels_emulated;

}  // namespace miniquant::kernels
