#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <miniquant/miniquant.h>

#include <utility>

#include "tensor_testing.h"

namespace miniquant {
namespace {

void expect_like(const at::Tensor& meta, const at::Tensor& real, const char* what) {
  EXPECT_TRUE(meta.is_meta()) << what;
  EXPECT_EQ(meta.sizes(), real.sizes()) << what;
  EXPECT_EQ(meta.strides(), real.strides()) << what;
  EXPECT_EQ(meta.scalar_type(), real.scalar_type()) << what;
}

TEST(Meta, ResultsHaveTheShapesDtypesAndStridesOfRealOnes) {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const auto& [rows, columns] : {std::pair{3, 130}, {1, 1}, {0, 5}, {2, 0}}) {
      for (const int64_t group_size : {64, 7, -1}) {
        SCOPED_TRACE(c10::str(dtype, ", ", rows, " x ", columns, ", group size ", group_size));
        const at::Tensor weight = testing::normal({rows, columns}, 1, dtype);
        const at::Tensor hessian =
            columns == 0 ? at::zeros({0, 0}) : testing::hessian_of_inputs(columns, 200, 2, at::kFloat);
        const at::Tensor meta_weight = weight.to(at::kMeta);
        const at::Tensor meta_hessian = hessian.to(at::kMeta);
        GptqOptions options;
        options.group_size = group_size;
        const QuantizedWeight nearest = rtn(weight, options);
        const QuantizedWeight meta_nearest = rtn(meta_weight, options);
        expect_like(meta_nearest.codes, nearest.codes, "rtn codes");
        expect_like(meta_nearest.scales, nearest.scales, "rtn scales");
        expect_like(meta_nearest.zero_points, nearest.zero_points, "rtn zero_points");
        for (const auto& run : {gptq, gptq_reference}) {
          const GptqResult result = run(weight, hessian, options);
          const GptqResult meta = run(meta_weight, meta_hessian, options);
          expect_like(meta.codes, result.codes, "codes");
          expect_like(meta.scales, result.scales, "scales");
          expect_like(meta.zero_points, result.zero_points, "zero_points");
          expect_like(meta.row_loss, result.row_loss, "row_loss");
        }
        const at::Tensor dequantized = dequantize(nearest.codes, nearest.scales, nearest.zero_points, group_size);
        const at::Tensor meta_dequantized =
            dequantize(meta_nearest.codes, meta_nearest.scales, meta_nearest.zero_points, group_size);
        expect_like(meta_dequantized, dequantized, "dequantized");
        expect_like(quantization_loss(meta_weight, meta_dequantized, meta_hessian),
                    quantization_loss(weight, dequantized, hessian), "loss");
        const at::Tensor packed = pack_int4(nearest.codes);
        const at::Tensor meta_packed = pack_int4(meta_nearest.codes);
        expect_like(meta_packed, packed, "packed");
        expect_like(unpack_int4(meta_packed, columns), unpack_int4(packed, columns), "unpacked");
      }
    }
  }
}

TEST(Meta, SuperblocksHaveTheShapesAndDtypesOfRealOnes) {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    for (const int64_t rows : {0, 3}) {
      for (const SuperblockType type : {SuperblockType::kQ2K, SuperblockType::kQ3K, SuperblockType::kQ5K}) {
        const at::Tensor weight = testing::normal({rows, 512}, 1, dtype);
        const at::Tensor hessian = testing::hessian_of_inputs(512, 700, 2, at::kFloat);
        const SuperblockWeight nearest = rtn_superblocks(weight, type);
        const SuperblockResult result = gptq_superblocks(weight, hessian, type);
        const SuperblockWeight meta_nearest = rtn_superblocks(weight.to(at::kMeta), type);
        const SuperblockResult meta = gptq_superblocks(weight.to(at::kMeta), hessian.to(at::kMeta), type);
        for (const auto& [of_meta, real] : {std::pair<SuperblockWeight, SuperblockWeight>{meta_nearest, nearest},
                                            std::pair<SuperblockWeight, SuperblockWeight>{meta, result}}) {
          expect_like(of_meta.codes, real.codes, "codes");
          expect_like(of_meta.scales, real.scales, "scales");
          expect_like(of_meta.zero_points, real.zero_points, "zero_points");
          expect_like(of_meta.minima, real.minima, "minima");
          expect_like(of_meta.super_scales, real.super_scales, "super_scales");
          expect_like(of_meta.super_minima, real.super_minima, "super_minima");
        }
        expect_like(meta.row_loss, result.row_loss, "row_loss");
        expect_like(dequantize(meta), dequantize(result), "dequantized");
      }
    }
  }
}

TEST(Meta, HessianUpdateReturnsItsArgument) {
  at::Tensor hessian = at::zeros({4, 4}, at::TensorOptions().device(at::kMeta));
  EXPECT_EQ(&hessian_update_(hessian, at::zeros({2, 3, 4}, at::TensorOptions().device(at::kMeta))), &hessian);
}

TEST(Meta, ProductUpdateReturnsItsArgument) {
  const auto meta = at::TensorOptions().device(at::kMeta);
  at::Tensor sum = at::zeros({4, 5}, meta);
  EXPECT_EQ(&product_update_(sum, at::zeros({2, 3, 4}, meta), at::zeros({2, 3, 5}, meta)), &sum);
}

}  // namespace
}  // namespace miniquant
