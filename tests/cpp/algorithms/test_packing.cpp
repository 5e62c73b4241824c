#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "algorithms/packing.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

TEST(Packing, EveryPairOfCodesHasItsByte) {
  const at::Tensor code = at::arange(-8, 8, at::kChar);
  const at::Tensor low = code.repeat({16});
  const at::Tensor high = code.repeat_interleave(16);
  const at::Tensor packed = pack(at::stack({low, high}, 1), 4);
  ASSERT_EQ(packed.sizes(), (std::vector<int64_t>{256, 1}));
  ASSERT_EQ(packed.scalar_type(), at::kByte);
  for (int64_t i = 0; i < 256; ++i) {
    // In two's complement a code c < 0 is 16 + c.
    const int expected = (low[i].item<int>() + 16) % 16 + 16 * ((high[i].item<int>() + 16) % 16);
    EXPECT_EQ(packed[i][0].item<int>(), expected) << low[i].item<int>() << ", " << high[i].item<int>();
  }
  EXPECT_TRUE(at::equal(unpack(packed, 4, 2), at::stack({low, high}, 1)));
}

TEST(Packing, EvenColumnsAreTheLowHalves) {
  const at::Tensor codes = at::tensor({1, 2, -1, -8}, at::kChar).unsqueeze(0);
  const at::Tensor packed = pack(codes, 4);
  EXPECT_EQ(packed[0][0].item<int>(), 0x21);
  EXPECT_EQ(packed[0][1].item<int>(), 0x8F);
}

TEST(Packing, AnOddLastColumnLeavesTheHighHalfZero) {
  const at::Tensor codes = at::tensor({1, 2, -1}, at::kChar).unsqueeze(0);
  const at::Tensor packed = pack(codes, 4);
  ASSERT_EQ(packed.sizes(), (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(packed[0][1].item<int>(), 0x0F);
  EXPECT_TRUE(at::equal(unpack(packed, 4, 3), codes));
}

TEST(Packing, RoundTripOfAnyShapeAndStride) {
  const at::Tensor codes = at::arange(0, 35 * 12, at::kLong).remainder(16).sub(8).to(at::kChar).view({35, 12});
  for (const at::Tensor& matrix : {codes, codes.mT(), codes.slice(1, 1, 12, 2), codes.slice(1, 0, 1)}) {
    const at::Tensor round_trip = unpack(pack(matrix, 4), 4, matrix.size(1));
    EXPECT_TRUE(at::equal(round_trip, matrix)) << matrix.sizes();
    EXPECT_TRUE(round_trip.is_contiguous());
  }
  const at::Tensor packed = pack(codes, 4);
  EXPECT_TRUE(at::equal(unpack(packed.mT().contiguous().mT(), 4, 12), codes));
}

// Bit by bit, by the definition of the stream in miniquant/packing.h.
TEST(Packing, ARowIsAStreamOfBitsOfAnyWidth) {
  for (int64_t bits = 2; bits <= 8; ++bits) {
    const auto levels = static_cast<int64_t>(uint64_t{1} << static_cast<unsigned>(bits));
    for (const int64_t columns : {1, 2, 3, 7, 8, 9, 16, 31}) {
      SCOPED_TRACE(c10::str(bits, " bits, ", columns, " columns"));
      const at::Tensor codes = at::arange(0, 3 * columns, at::kLong)
                                   .mul(37)
                                   .remainder(levels)
                                   .sub(levels / 2)
                                   .to(at::kChar)
                                   .view({3, columns});
      const at::Tensor packed = pack(codes, bits);
      ASSERT_EQ(packed.sizes(), (std::vector<int64_t>{3, (columns * bits + 7) / 8}));
      ASSERT_TRUE(packed.is_contiguous());
      for (int64_t row = 0; row < 3; ++row) {
        std::vector<uint8_t> expected(static_cast<size_t>(packed.size(1)));
        for (int64_t bit = 0; bit < columns * bits; ++bit) {
          const auto code = static_cast<unsigned>(codes[row][bit / bits].item<int>());
          expected[static_cast<size_t>(bit / 8)] |= static_cast<uint8_t>(
              ((code >> static_cast<unsigned>(bit % bits)) & 1U) << static_cast<unsigned>(bit % 8));
        }
        const auto* const found = packed.const_data_ptr<uint8_t>() + row * packed.size(1);
        EXPECT_EQ(std::vector<uint8_t>(found, found + packed.size(1)), expected);
      }
      EXPECT_TRUE(at::equal(unpack(packed, bits, columns), codes));
      EXPECT_TRUE(at::equal(pack(codes.mT().contiguous().mT(), bits), packed));
      EXPECT_TRUE(at::equal(pack_by_operations(codes, bits), packed));
      EXPECT_TRUE(at::equal(unpack_by_operations(packed, bits, columns), codes));
    }
  }
}

TEST(Packing, LeavesOutWhatACodeHasAboveItsBits) {
  for (int64_t bits = 2; bits < 8; ++bits) {
    const at::Tensor bytes = at::arange(-128, 128, at::kChar).view({4, 64});
    const at::Tensor codes = unpack(pack(bytes, bits), bits, 64);
    const auto levels = static_cast<int64_t>(uint64_t{1} << static_cast<unsigned>(bits));
    const at::Tensor lowest = bytes.to(at::kLong).remainder(levels);
    EXPECT_TRUE(at::equal(codes.to(at::kLong), lowest.sub(lowest.ge(levels / 2).mul(levels)))) << bits;
  }
}

TEST(Packing, RowsInParallelAreThoseOfOneThread) {
  const at::Tensor codes =
      at::arange(0, 1000 * 77, at::kLong).mul(37).remainder(8).sub(4).to(at::kChar).view({1000, 77});
  const at::Tensor packed = pack(codes, 3);
  EXPECT_TRUE(at::equal(packed, pack_by_operations(codes, 3)));
  EXPECT_TRUE(at::equal(unpack(packed, 3, 77), codes));
}

TEST(Packing, KnowsWhichCodesFit) {
  for (int64_t bits = 2; bits <= 8; ++bits) {
    const auto half = static_cast<int64_t>(uint64_t{1} << static_cast<unsigned>(bits - 1));
    at::Tensor codes = at::arange(0, 700 * 300, at::kLong).remainder(2 * half).sub(half).to(at::kChar).view({700, 300});
    EXPECT_TRUE(fit_in(codes, bits)) << bits;
    EXPECT_TRUE(fit_in(codes.mT(), bits)) << bits;
    for (int64_t code = -128; code < 128; ++code) {
      codes[699][299] = code;
      EXPECT_EQ(fit_in(codes, bits), code >= -half && code < half) << bits << ", " << code;
    }
  }
  EXPECT_TRUE(fit_in(at::empty({0, 5}, at::kChar), 4));
}

TEST(Packing, KeepsEmptyShapes) {
  EXPECT_EQ(pack(at::empty({0, 5}, at::kChar), 4).sizes(), (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(pack(at::empty({4, 0}, at::kChar), 4).sizes(), (std::vector<int64_t>{4, 0}));
  EXPECT_EQ(unpack(at::empty({0, 3}, at::kByte), 4, 5).sizes(), (std::vector<int64_t>{0, 5}));
  EXPECT_EQ(unpack(at::empty({4, 0}, at::kByte), 4, 0).sizes(), (std::vector<int64_t>{4, 0}));
}

}  // namespace
}  // namespace miniquant::algorithms
