// kernels/bf16.h: H += X^T X from packed parts, with every unit and with the emulation of one.

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/bf16.h"
#include "kernels/kernel_testing.h"

namespace miniquant::kernels::testing {
namespace {

using Halves = std::vector<std::uint16_t>;

std::uint16_t bf16(float value) { return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16U); }
float value_of(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16U); }

Halves normal_bf16(std::mt19937_64& generator, std::int64_t count) {
  Halves bits;
  for (const float value : normal<float>(generator, count)) {
    bits.push_back(bf16(value));
  }
  return bits;
}

/// kNone stands for the emulation.
class Bf16 : public ::testing::TestWithParam<Bf16Unit> {
 protected:
  void SetUp() override {
    if (!is_supported(GetParam())) {
      GTEST_SKIP() << "needs a CPU with " << name(GetParam());
    }
  }
  static const Bf16Kernels& kernels() {
    return GetParam() == Bf16Unit::kNone ? bf16_kernels_emulated : bf16_kernels_for(GetParam());
  }
};
INSTANTIATE_TEST_SUITE_P(Units, Bf16, ::testing::ValuesIn(kBf16Units), [](const auto& unit) {
  return unit.param == Bf16Unit::kNone ? "emulated" : name(unit.param);
});

/// Packed tiles of both sides, in memory that ends where they do.
struct Packed {
  Bf16Layout layout;
  GuardedBuffer<std::uint16_t> left;
  GuardedBuffer<std::uint16_t> right;

  Packed(Bf16Layout of, std::int64_t left_parts, std::int64_t right_parts)
      : layout(of), left(left_parts * of.size(), 64), right(right_parts * of.size(), 64) {}

  [[nodiscard]] std::uint16_t left_at(std::int64_t part, std::int64_t token, std::int64_t column) const {
    return left[part * layout.size() + offset(token, column) + column % kBf16Columns * kBf16Tokens +
                token % kBf16Tokens];
  }
  [[nodiscard]] std::uint16_t right_at(std::int64_t part, std::int64_t token, std::int64_t column) const {
    return right[part * layout.size() + offset(token, column) +
                 (token % kBf16Tokens / 2 * kBf16Columns + column % kBf16Columns) * 2 + token % 2];
  }

 private:
  [[nodiscard]] std::int64_t offset(std::int64_t token, std::int64_t column) const {
    return layout.offset(column / kBf16Columns, token / kBf16Tokens);
  }
};

// One column; a panel less one, a panel, a panel plus one; two panels plus one; more than a square of 16 panels.
constexpr std::int64_t kBf16Widths[] = {1, 15, 16, 17, 33, 290};
// One token; odd and even numbers of tokens; a block, and one more; a run of 512 and a part of the next.
constexpr std::int64_t kTokens[] = {1, 2, 31, 32, 33, 547};

/// body(rows, packed) for random rows [tokens, columns] of all these sizes, packed as one part; the trace of a failure
/// names the size.
template <typename Body>
void for_each_size(const Bf16Kernels& kernels, std::mt19937_64& generator, const Body& body) {
  for (const std::int64_t columns : kBf16Widths) {
    for (const std::int64_t tokens : kTokens) {
      SCOPED_TRACE(::testing::Message() << columns << " columns, " << tokens << " tokens");
      const Bf16Layout layout{columns, tokens};
      const GuardedBuffer<std::uint16_t> rows(normal_bf16(generator, tokens * columns));
      Packed packed(layout, 1, 1);
      for (std::int64_t block = 0; block < layout.blocks(); ++block) {
        kernels.pack_bf16(rows.data() + block * kBf16Tokens * layout.columns, nullptr, layout, block,
                          {packed.left.data(), 1}, {packed.right.data(), 1});
      }
      body(rows, packed);
    }
  }
}

TEST_P(Bf16, PacksEveryTokenOnceAndZerosPastThem) {
  std::mt19937_64 generator(1);
  for_each_size(kernels(), generator, [&](const GuardedBuffer<std::uint16_t>& rows, const Packed& packed) {
    const auto [columns, tokens] = packed.layout;
    for (std::int64_t token = 0; token < packed.layout.blocks() * kBf16Tokens; ++token) {
      for (std::int64_t column = 0; column < packed.layout.panels() * kBf16Columns; ++column) {
        const bool inside = token < tokens && column < columns;
        const std::uint16_t expected = inside ? rows[token * columns + column] : std::uint16_t{0};
        ASSERT_EQ(packed.left_at(0, token, column), expected) << token << ", " << column;
        ASSERT_EQ(packed.right_at(0, token, column), expected) << token << ", " << column;
      }
    }
  });
}

TEST_P(Bf16, PartsOfFloat32AddUpToIt) {
  std::mt19937_64 generator(2);
  std::vector<float> values = normal<float>(generator, std::int64_t{40} * 33);
  // the largest of float32; the smallest whose parts are all normal; the last bit set; zeros
  constexpr float kLargest = std::numeric_limits<float>::max();
  const std::vector<float> special = {kLargest, -kLargest, 0x1p-103F, -0x1.fffffep-80F, 0x1.000002p0F, 0.0F, -0.0F};
  std::ranges::copy(special, values.begin());
  const Bf16Layout layout{33, 40};
  const GuardedBuffer<float> rows(values);
  Packed packed(layout, 2, 3);
  for (std::int64_t block = 0; block < layout.blocks(); ++block) {
    kernels().pack_f32(rows.data() + block * kBf16Tokens * layout.columns, nullptr, layout, block,
                       {packed.left.data(), 2}, {packed.right.data(), 3});
  }
  for (std::int64_t token = 0; token < layout.tokens; ++token) {
    for (std::int64_t column = 0; column < layout.columns; ++column) {
      double sum = 0;
      for (std::int64_t part = 0; part < 3; ++part) {
        sum += value_of(packed.right_at(part, token, column));
      }
      ASSERT_EQ(sum, rows[token * layout.columns + column]);
      ASSERT_EQ(packed.left_at(0, token, column), packed.right_at(0, token, column));
      ASSERT_EQ(packed.left_at(1, token, column), packed.right_at(1, token, column));
    }
  }
}

TEST_P(Bf16, WeightsCountOnTheRight) {
  std::mt19937_64 generator(6);
  const Bf16Layout layout{33, 41};
  const GuardedBuffer<std::uint16_t> rows(normal_bf16(generator, layout.tokens * layout.columns));
  std::vector<float> of_tokens = normal<float>(generator, layout.tokens);
  of_tokens[0] = 0.25F;
  const GuardedBuffer<float> weights(of_tokens);
  Packed packed(layout, 1, 3);
  for (std::int64_t block = 0; block < layout.blocks(); ++block) {
    kernels().pack_bf16(rows.data() + block * kBf16Tokens * layout.columns, weights.data(), layout, block,
                        {packed.left.data(), 1}, {packed.right.data(), 3});
  }
  for (std::int64_t token = 0; token < layout.tokens; ++token) {
    for (std::int64_t column = 0; column < layout.columns; ++column) {
      const std::uint16_t value = rows[token * layout.columns + column];
      ASSERT_EQ(packed.left_at(0, token, column), value) << token << ", " << column;
      double sum = 0;
      for (std::int64_t part = 0; part < 3; ++part) {
        sum += value_of(packed.right_at(part, token, column));
      }
      ASSERT_EQ(sum, value_of(value) * weights[token]) << token << ", " << column;
    }
  }
  for (std::int64_t column = 0; column < layout.columns; ++column) {
    EXPECT_EQ(value_of(packed.right_at(0, 0, column)), value_of(rows[column]) * 0.25F) << "a power of two: one part";
  }
}

/// A value of float16: 11 significant bits, subnormals at 2^-24.
float float16_of(float value) { return std::nearbyint(value * 0x1p24F) * 0x1p-24F; }

TEST_P(Bf16, TwoPartsHoldFloat16) {
  std::vector<float> values = {65504.0F, -65504.0F, 0x1p-24F, -0x1.ffcp-15F, 0x1.554p3F, 1.0F + 0x1p-10F};
  for (int i = 0; i < 64; ++i) {
    values.push_back(float16_of(static_cast<float>(i) * 0x1.55p-19F));
  }
  const Bf16Layout layout{static_cast<std::int64_t>(values.size()), 1};
  const GuardedBuffer<float> rows(values);
  Packed packed(layout, 2, 2);
  kernels().pack_f32(rows.data(), nullptr, layout, 0, {packed.left.data(), 2}, {packed.right.data(), 2});
  for (std::int64_t column = 0; column < layout.columns; ++column) {
    EXPECT_EQ(value_of(packed.left_at(0, 0, column)) + value_of(packed.left_at(1, 0, column)), rows[column]);
  }
}

/// hessian += products of packed tiles, all squares.
void add_all(const Bf16Kernels& kernels, const Packed& packed, const std::vector<Bf16Product>& products,
             std::int64_t square_panels, float* hessian) {
  const Bf16Problem problem{.left_layout = packed.layout,
                            .right_layout = packed.layout,
                            .left = packed.left.data(),
                            .right = packed.right.data(),
                            .products = products.data(),
                            .product_count = static_cast<std::int64_t>(products.size()),
                            .square_panels = square_panels,
                            .sum = hessian};
  GuardedBuffer<float> workspace(bf16_square_elements(square_panels), 64);
  const std::int64_t squares = ceil_div(packed.layout.panels(), square_panels);
  for (std::int64_t j = 0; j < squares; ++j) {
    for (std::int64_t i = 0; i <= j; ++i) {
      kernels.add_mirrored(problem, j, i, workspace.data());
    }
  }
}

// An exact product and two roundings per token in a sum of 128 tokens at most; then a rounding per sum and product, and
// those of the additions to other sums and to H.
TEST_P(Bf16, AddsTheProductsToBothTriangles) {
  std::mt19937_64 generator(3);
  for_each_size(kernels(), generator, [&](const GuardedBuffer<std::uint16_t>& rows, const Packed& packed) {
    const auto [columns, tokens] = packed.layout;
    GuardedBuffer<float> hessian(normal<float>(generator, columns * columns));
    const std::vector<float> before = hessian.values();
    add_all(kernels(), packed, {{0, 0}}, 4, hessian.data());
    const std::int64_t sums = tokens / 128;
    const auto roundings = static_cast<double>(2 * std::min<std::int64_t>(tokens, 128) + sums + 3);
    for (std::int64_t j = 0; j < columns; ++j) {
      for (std::int64_t i = 0; i < columns; ++i) {
        double expected = before[static_cast<std::size_t>(j * columns + i)];
        double magnitude = std::abs(expected);
        for (std::int64_t token = 0; token < tokens; ++token) {
          const double product = static_cast<double>(value_of(rows[token * columns + j])) *
                                 static_cast<double>(value_of(rows[token * columns + i]));
          expected += product;
          magnitude += std::abs(product);
        }
        ASSERT_LE(std::abs(hessian[j * columns + i] - expected), roundings * kEps<float> * magnitude) << j << ", " << i;
      }
    }
  });
}

// Small integers: every sum is exact, so all products count once and in the right place.
TEST_P(Bf16, AddsEveryProductOfTheList) {
  std::mt19937_64 generator(4);
  std::uniform_int_distribution<int> integer(-3, 3);
  const Bf16Layout layout{45, 67};
  const auto integers = [&] {
    Halves bits(static_cast<std::size_t>(layout.size()));
    for (std::uint16_t& one : bits) {
      one = bf16(static_cast<float>(integer(generator)));
    }
    return bits;
  };
  Packed packed(layout, 2, 3);
  // Random parts on both sides have no symmetric sum; what is mirrored is the lower triangle.
  for (std::int64_t part = 0; part < 3; ++part) {
    const Halves bits = integers();
    std::ranges::copy(bits, packed.right.data() + part * layout.size());
  }
  for (std::int64_t part = 0; part < 2; ++part) {
    const Halves bits = integers();
    std::ranges::copy(bits, packed.left.data() + part * layout.size());
  }
  const std::vector<Bf16Product> products = {{0, 2}, {1, 0}, {1, 1}};
  GuardedBuffer<float> hessian(std::vector<float>(static_cast<std::size_t>(layout.columns * layout.columns), 1.0F));
  add_all(kernels(), packed, products, 2, hessian.data());
  for (std::int64_t j = 0; j < layout.columns; ++j) {
    for (std::int64_t i = 0; i <= j; ++i) {
      float expected = 1.0F;
      for (const auto [left, right] : products) {
        for (std::int64_t token = 0; token < packed.layout.blocks() * kBf16Tokens; ++token) {
          expected += value_of(packed.left_at(left, token, j)) * value_of(packed.right_at(right, token, i));
        }
      }
      ASSERT_EQ(hessian[j * layout.columns + i], expected);
      ASSERT_EQ(hessian[i * layout.columns + j], expected);
    }
  }
}

// Every sum is exact: integers of two parts, below 2^24 in all. Each side is packed alone; one has more panels than a
// square.
TEST_P(Bf16, AddsTheProductsOfTwoBatches) {
  std::mt19937_64 generator(7);
  std::uniform_int_distribution<int> sign(-1, 1);
  const auto integers = [&](std::int64_t count) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) {
      value = static_cast<float>(sign(generator) * 257);  // 256 and 1
    }
    return GuardedBuffer<float>(values);
  };
  for (const auto& [rows, columns] : {std::pair<std::int64_t, std::int64_t>{1, 70}, {70, 1}, {33, 47}, {130, 20}}) {
    for (const std::int64_t tokens : {std::int64_t{1}, std::int64_t{33}, std::int64_t{547}}) {
      SCOPED_TRACE(::testing::Message() << rows << " x " << columns << ", " << tokens << " tokens");
      const Bf16Layout left_layout{rows, tokens};
      const Bf16Layout right_layout{columns, tokens};
      const GuardedBuffer<float> left_rows = integers(tokens * rows);
      const GuardedBuffer<float> right_rows = integers(tokens * columns);
      GuardedBuffer<std::uint16_t> left(2 * left_layout.size(), 64);
      GuardedBuffer<std::uint16_t> right(2 * right_layout.size(), 64);
      for (std::int64_t block = 0; block < left_layout.blocks(); ++block) {
        const std::int64_t first = block * kBf16Tokens;
        kernels().pack_f32(left_rows.data() + first * rows, nullptr, left_layout, block, {left.data(), 2}, {});
        kernels().pack_f32(right_rows.data() + first * columns, nullptr, right_layout, block, {}, {right.data(), 2});
      }
      GuardedBuffer<float> sum(std::vector<float>(static_cast<std::size_t>(rows * columns), 1.0F));
      const std::vector<Bf16Product> products = {{0, 0}, {0, 1}, {1, 1}, {1, 0}};
      const Bf16Problem problem{.left_layout = left_layout,
                                .right_layout = right_layout,
                                .left = left.data(),
                                .right = right.data(),
                                .products = products.data(),
                                .product_count = 4,
                                .square_panels = 4,
                                .sum = sum.data()};
      GuardedBuffer<float> workspace(bf16_square_elements(4), 64);
      for (std::int64_t j = 0; j < ceil_div(left_layout.panels(), std::int64_t{4}); ++j) {
        for (std::int64_t i = 0; i < ceil_div(right_layout.panels(), std::int64_t{4}); ++i) {
          kernels().add_square(problem, j, i, workspace.data());
        }
      }
      for (std::int64_t j = 0; j < rows; ++j) {
        for (std::int64_t i = 0; i < columns; ++i) {
          double expected = 1.0;
          for (std::int64_t token = 0; token < tokens; ++token) {
            expected +=
                static_cast<double>(left_rows[token * rows + j]) * static_cast<double>(right_rows[token * columns + i]);
          }
          ASSERT_EQ(sum[j * columns + i], expected) << j << ", " << i;
        }
      }
    }
  }
}

TEST_P(Bf16, SizesOfSquaresDoNotChangeABit) {
  std::mt19937_64 generator(5);
  const Bf16Layout layout{290, 600};
  const GuardedBuffer<std::uint16_t> rows(normal_bf16(generator, layout.tokens * layout.columns));
  Packed packed(layout, 1, 1);
  for (std::int64_t block = 0; block < layout.blocks(); ++block) {
    kernels().pack_bf16(rows.data() + block * kBf16Tokens * layout.columns, nullptr, layout, block,
                        {packed.left.data(), 1}, {packed.right.data(), 1});
  }
  const auto sum_with = [&](std::int64_t square_panels) {
    GuardedBuffer<float> hessian(std::vector<float>(static_cast<std::size_t>(layout.columns * layout.columns), 0.5F));
    add_all(kernels(), packed, {{0, 0}}, square_panels, hessian.data());
    return hessian.values();
  };
  const std::vector<float> largest = sum_with(kernels().most_square_panels);
  EXPECT_EQ(sum_with(2), largest);
  EXPECT_EQ(sum_with(8), largest);
  EXPECT_EQ(sum_with(16), largest);
}

/// X^T X for one token X.
std::vector<float> square_of_token(const Bf16Kernels& kernels, const std::vector<float>& values) {
  const Bf16Layout layout{static_cast<std::int64_t>(values.size()), 1};
  Halves bits;
  for (const float value : values) {
    bits.push_back(bf16(value));
  }
  const GuardedBuffer<std::uint16_t> rows(bits);
  Packed packed(layout, 1, 1);
  kernels.pack_bf16(rows.data(), nullptr, layout, 0, {packed.left.data(), 1}, {packed.right.data(), 1});
  GuardedBuffer<float> hessian(std::vector<float>(values.size() * values.size()));
  add_all(kernels, packed, {{0, 0}}, 2, hessian.data());
  return hessian.values();
}

TEST_P(Bf16, ProductsNearTheLimitsOfFloat32) {
  // zeros of both signs; products just below the largest float32; the smallest normal product
  constexpr float kRoot = 0x1.fep63F;
  const std::vector<float> values = {0.0F, -0.0F, kRoot, -kRoot, 0x1p-63F, -3.0F};
  const std::vector<float> squares = square_of_token(kernels(), values);
  for (std::size_t j = 0; j < values.size(); ++j) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      EXPECT_EQ(squares[j * values.size() + i], values[j] * values[i]) << j << ", " << i;
    }
  }
}

// The units take subnormal values as 0. Such a value changes its own column's diagonal by less than float32 can hold,
// and other entries by less than 2^-126 times the other value.
TEST_P(Bf16, SubnormalValuesCountAsZeroOrExactly) {
  constexpr float kSubnormal = 0x1p-130F;
  const std::vector<float> values = {kSubnormal, 1.0F, 0x1p100F};
  const std::vector<float> squares = square_of_token(kernels(), values);
  EXPECT_EQ(squares[0], 0.0F);
  EXPECT_EQ(values[0] * values[0], 0.0F);
  for (std::size_t i = 1; i < values.size(); ++i) {
    EXPECT_LE(std::abs(squares[i] - kSubnormal * values[i]), 0x1p-126F * values[i]);
    EXPECT_EQ(squares[i * values.size()], squares[i]);
  }
  EXPECT_EQ(squares[5], 0x1p100F);
}

TEST(Bf16Units, TableIsThatOfTheUnitAskedFor) {
  for (const Bf16Unit unit : kBf16Units) {
    if (unit != Bf16Unit::kNone && is_supported(unit)) {
      EXPECT_STREQ(bf16_kernels_for(unit).name, name(unit));
      EXPECT_GE(bf16_kernels_for(unit).most_products, 1);
      continue;
    }
    try {
      bf16_kernels_for(unit);
      ADD_FAILURE() << "no exception for " << name(unit);
    } catch (const std::invalid_argument& error) {
      EXPECT_EQ(std::string(error.what()),
                std::string("bf16_kernels_for: expected a supported unit, but got '") + name(unit) + "'");
    }
  }
}

TEST(Bf16Units, ChosenKernelsAreThoseOfTheChosenUnitAndStay) {
  EXPECT_EQ(bf16_unit(), choose_bf16_unit());
  if (bf16_unit() == Bf16Unit::kNone) {
    EXPECT_EQ(bf16_kernels(), nullptr);
  } else {
    EXPECT_EQ(bf16_kernels(), &bf16_kernels_for(bf16_unit()));
  }
}

}  // namespace
}  // namespace miniquant::kernels::testing
