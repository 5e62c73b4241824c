#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <vector>

#include "algorithms/packing.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

TEST(Packing, EveryPairOfCodesHasItsByte) {
  const at::Tensor code = at::arange(-8, 8, at::kChar);
  const at::Tensor low = code.repeat({16});
  const at::Tensor high = code.repeat_interleave(16);
  const at::Tensor packed = pack_int4(at::stack({low, high}, 1));
  ASSERT_EQ(packed.sizes(), (std::vector<int64_t>{256, 1}));
  ASSERT_EQ(packed.scalar_type(), at::kByte);
  for (int64_t i = 0; i < 256; ++i) {
    // In two's complement a code c < 0 is 16 + c.
    const int expected = (low[i].item<int>() + 16) % 16 + 16 * ((high[i].item<int>() + 16) % 16);
    EXPECT_EQ(packed[i][0].item<int>(), expected) << low[i].item<int>() << ", " << high[i].item<int>();
  }
  EXPECT_TRUE(at::equal(unpack_int4(packed, 2), at::stack({low, high}, 1)));
}

TEST(Packing, EvenColumnsAreTheLowHalves) {
  const at::Tensor codes = at::tensor({1, 2, -1, -8}, at::kChar).unsqueeze(0);
  const at::Tensor packed = pack_int4(codes);
  EXPECT_EQ(packed[0][0].item<int>(), 0x21);
  EXPECT_EQ(packed[0][1].item<int>(), 0x8F);
}

TEST(Packing, AnOddLastColumnLeavesTheHighHalfZero) {
  const at::Tensor codes = at::tensor({1, 2, -1}, at::kChar).unsqueeze(0);
  const at::Tensor packed = pack_int4(codes);
  ASSERT_EQ(packed.sizes(), (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(packed[0][1].item<int>(), 0x0F);
  EXPECT_TRUE(at::equal(unpack_int4(packed, 3), codes));
}

TEST(Packing, RoundTripOfAnyShapeAndStride) {
  const at::Tensor codes = at::arange(0, 35 * 12, at::kLong).remainder(16).sub(8).to(at::kChar).view({35, 12});
  for (const at::Tensor& matrix : {codes, codes.mT(), codes.slice(1, 1, 12, 2), codes.slice(1, 0, 1)}) {
    const at::Tensor round_trip = unpack_int4(pack_int4(matrix), matrix.size(1));
    EXPECT_TRUE(at::equal(round_trip, matrix)) << matrix.sizes();
    EXPECT_TRUE(round_trip.is_contiguous());
  }
  const at::Tensor packed = pack_int4(codes);
  EXPECT_TRUE(at::equal(unpack_int4(packed.mT().contiguous().mT(), 12), codes));
}

TEST(Packing, KeepsEmptyShapes) {
  EXPECT_EQ(pack_int4(at::empty({0, 5}, at::kChar)).sizes(), (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(pack_int4(at::empty({4, 0}, at::kChar)).sizes(), (std::vector<int64_t>{4, 0}));
  EXPECT_EQ(unpack_int4(at::empty({0, 3}, at::kByte), 5).sizes(), (std::vector<int64_t>{0, 5}));
  EXPECT_EQ(unpack_int4(at::empty({4, 0}, at::kByte), 0).sizes(), (std::vector<int64_t>{4, 0}));
}

}  // namespace
}  // namespace miniquant::algorithms
