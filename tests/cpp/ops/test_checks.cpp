// Every message of ops/checks.cpp, in full. Messages about shapes, dtypes, devices and options come from a real and
// from a meta tensor alike; messages about values from real tensors only.

#include <ATen/ops/_nested_tensor_from_tensor_list.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/quantize_per_tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <miniquant/miniquant.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "ops/operators.h"
#include "tensor_testing.h"

namespace miniquant {
namespace {

using testing::call_gptq;
using testing::message_of;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

enum class Kind { kValue, kType };

/// A call that must fail, with tensors on the given device.
struct BadCall {
  Kind kind;
  std::string message;
  std::function<void(at::Device)> call;
};

std::string message_of_call(const BadCall& bad, at::Device device) {
  return bad.kind == Kind::kValue ? message_of<c10::ValueError>([&] { bad.call(device); })
                                  : message_of<c10::TypeError>([&] { bad.call(device); });
}

at::Tensor on(at::Device device, at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
  return at::ones(sizes, at::TensorOptions().dtype(dtype).device(device));
}

GptqOptions with(const std::function<void(GptqOptions&)>& change) {
  GptqOptions options;
  options.group_size = 2;
  change(options);
  return options;
}

/// gptq of a [2, 4] weight with a wrong option.
std::function<void(at::Device)> gptq_with(const std::function<void(GptqOptions&, at::Device)>& change) {
  return [change](at::Device device) {
    gptq(on(device, {2, 4}), on(device, {4, 4}), with([&](GptqOptions& options) { change(options, device); }));
  };
}

std::vector<BadCall> bad_arguments() {
  std::vector<BadCall> table = {
      // weight
      {Kind::kValue, "rtn: expected weight to be a matrix [N, K], but got shape [4]",
       [](at::Device device) { rtn(on(device, {4})); }},
      {Kind::kType, "rtn: expected weight to be float32, float64, bfloat16 or float16, but got int8",
       [](at::Device device) { rtn(on(device, {2, 4}, at::kChar)); }},
      {Kind::kType, "rtn: expected weight to be float32, float64, bfloat16 or float16, but got complex64",
       [](at::Device device) { rtn(on(device, {2, 4}, at::kComplexFloat)); }},
      // the grid
      {Kind::kValue, "gptq: expected bits to be 2 to 8, but got 1",
       gptq_with([](GptqOptions& options, at::Device) { options.bits = 1; })},
      {Kind::kValue, "gptq: expected bits to be 2 to 8, but got 9",
       gptq_with([](GptqOptions& options, at::Device) { options.bits = 9; })},
      {Kind::kValue, "gptq: expected group_size to be positive, or -1 for one group per row, but got 0",
       gptq_with([](GptqOptions& options, at::Device) { options.group_size = 0; })},
      {Kind::kValue, "gptq: expected group_size to be positive, or -1 for one group per row, but got -2",
       gptq_with([](GptqOptions& options, at::Device) { options.group_size = -2; })},
      {Kind::kValue, "gptq: expected zero_points to come with scales, but got no scales",
       gptq_with([](GptqOptions& options, at::Device device) { options.zero_points = on(device, {2, 2}, at::kChar); })},
      {Kind::kValue, "gptq: expected scales to come with zero_points where symmetric=False, but got no zero_points",
       gptq_with([](GptqOptions& options, at::Device device) {
         options.symmetric = false;
         options.scales = on(device, {2, 2});
       })},
      {Kind::kType, "gptq: expected scales to have the dtype of weight (float32), but got float64",
       gptq_with([](GptqOptions& options, at::Device device) { options.scales = on(device, {2, 2}, at::kDouble); })},
      {Kind::kValue, "gptq: expected scales to have shape [N, groups] = [2, 2], but got shape [2, 3]",
       gptq_with([](GptqOptions& options, at::Device device) { options.scales = on(device, {2, 3}); })},
      {Kind::kValue, "gptq: expected scales to have shape [N, groups] = [2, 2], but got shape [4]",
       gptq_with([](GptqOptions& options, at::Device device) { options.scales = on(device, {4}); })},
      {Kind::kType, "gptq: expected zero_points to be int8, but got int64",
       gptq_with([](GptqOptions& options, at::Device device) {
         options.scales = on(device, {2, 2});
         options.zero_points = on(device, {2, 2}, at::kLong);
       })},
      {Kind::kValue, "gptq: expected zero_points to have shape [N, groups] = [2, 2], but got shape [1, 2]",
       gptq_with([](GptqOptions& options, at::Device device) {
         options.scales = on(device, {2, 2});
         options.zero_points = on(device, {1, 2}, at::kChar);
       })},
      {Kind::kType,
       "gptq: expected scale_dtype to be float32, bfloat16 or float16 for a float32 weight, but got float64",
       gptq_with([](GptqOptions& options, at::Device) { options.scale_dtype = at::kDouble; })},
      {Kind::kType,
       "gptq: expected scale_dtype to be float32, bfloat16, float16 or float64 for a float64 weight, but got int8",
       [](at::Device device) {
         GptqOptions options;
         options.scale_dtype = at::kChar;
         gptq(on(device, {2, 4}, at::kDouble), on(device, {4, 4}), options);
       }},
      {Kind::kType, "gptq: expected scales to have scale_dtype (bfloat16), but got float32",
       gptq_with([](GptqOptions& options, at::Device device) {
         options.scale_dtype = at::kBFloat16;
         options.scales = on(device, {2, 2});
       })},
      // the Hessian
      {Kind::kValue, "gptq: expected hessian to be a matrix [K, K], but got shape [4, 4, 1]",
       [](at::Device device) { gptq(on(device, {2, 4}), on(device, {4, 4, 1})); }},
      {Kind::kValue, "gptq: expected hessian to be square, but got shape [4, 5]",
       [](at::Device device) { gptq(on(device, {2, 4}), on(device, {4, 5})); }},
      {Kind::kType, "gptq: expected hessian to be float32 or float64, but got bfloat16",
       [](at::Device device) { gptq(on(device, {2, 4}), on(device, {4, 4}, at::kBFloat16)); }},
      {Kind::kValue,
       "gptq: expected hessian to have shape [K, K] = [4, 4] for a weight of shape [2, 4], but got shape [5, 5]",
       [](at::Device device) { gptq(on(device, {2, 4}), on(device, {5, 5})); }},
      // the other options of gptq
      {Kind::kValue, "gptq: expected ridge to be finite and not negative, but got -0.5",
       gptq_with([](GptqOptions& options, at::Device) { options.ridge = -0.5; })},
      {Kind::kValue, "gptq: expected ridge to be finite and not negative, but got nan",
       gptq_with([](GptqOptions& options, at::Device) { options.ridge = kNan; })},
      {Kind::kValue, "gptq: expected ridge to be finite and not negative, but got inf",
       gptq_with([](GptqOptions& options, at::Device) { options.ridge = kInf; })},
      {Kind::kValue, "gptq: expected ridge to be at most 3.40282e+38 for a float32 weight, but got 1e+40",
       gptq_with([](GptqOptions& options, at::Device) { options.ridge = 1e40; })},
      {Kind::kValue, "gptq: expected block_size to be positive, but got 0",
       gptq_with([](GptqOptions& options, at::Device) { options.block_size = 0; })},
      {Kind::kValue, "gptq: expected group_scales to be 'static' or 'dynamic', but got 'Static'",
       [](at::Device device) { call_gptq("gptq", on(device, {2, 4}), on(device, {4, 4}), "Static", "natural"); }},
      {Kind::kValue, "gptq: expected column_order to be 'natural', 'activation' or 'group', but got ''",
       [](at::Device device) { call_gptq("gptq", on(device, {2, 4}), on(device, {4, 4}), "static", ""); }},
      {Kind::kValue,
       "gptq: expected column_order to be 'natural' or 'group' with group_scales='dynamic' (in activation order the "
       "columns of a stored group are not reached together), but got 'activation'",
       [](at::Device device) { call_gptq("gptq", on(device, {2, 4}), on(device, {4, 4}), "dynamic", "activation"); }},
      {Kind::kValue,
       "gptq: expected no scales with group_scales='dynamic', which computes them, but got scales of shape [2, 2]",
       gptq_with([](GptqOptions& options, at::Device device) {
         options.group_scales = GroupScales::kDynamic;
         options.scales = on(device, {2, 2});
       })},
      // each op gives its own name
      {Kind::kValue, "rtn: expected bits to be 2 to 8, but got 0",
       [](at::Device device) {
         GridOptions options;
         options.bits = 0;
         rtn(on(device, {2, 4}), options);
       }},
      {Kind::kValue, "gptq_reference: expected hessian to be square, but got shape [4, 5]",
       [](at::Device device) { gptq_reference(on(device, {2, 4}), on(device, {4, 5})); }},
      // hessian_update_
      {Kind::kValue, "hessian_update_: expected hessian to be square, but got shape [4, 5]",
       [](at::Device device) {
         at::Tensor hessian = on(device, {4, 5});
         hessian_update_(hessian, on(device, {3, 5}));
       }},
      {Kind::kType, "hessian_update_: expected inputs to be float32, float64, bfloat16 or float16, but got int64",
       [](at::Device device) {
         at::Tensor hessian = on(device, {4, 4});
         hessian_update_(hessian, on(device, {3, 4}, at::kLong));
       }},
      {Kind::kValue, "hessian_update_: expected inputs to have shape [..., K] = [..., 4], but got shape [3, 5]",
       [](at::Device device) {
         at::Tensor hessian = on(device, {4, 4});
         hessian_update_(hessian, on(device, {3, 5}));
       }},
      {Kind::kValue, "hessian_update_: expected inputs to have shape [..., K] = [..., 4], but got shape []",
       [](at::Device device) {
         at::Tensor hessian = on(device, {4, 4});
         hessian_update_(hessian, on(device, {}));
       }},
      // quantization_loss
      {Kind::kValue, "quantization_loss: expected dequantized to have the shape of weight [2, 4], but got shape [2, 3]",
       [](at::Device device) { quantization_loss(on(device, {2, 4}), on(device, {2, 3}), on(device, {4, 4})); }},
      {Kind::kType,
       "quantization_loss: expected dequantized to be float32, float64, bfloat16 or float16, but got int32",
       [](at::Device device) {
         quantization_loss(on(device, {2, 4}), on(device, {2, 4}, at::kInt), on(device, {4, 4}));
       }},
      {Kind::kValue,
       "quantization_loss: expected hessian to have shape [K, K] = [4, 4] for a weight of shape [2, 4], but got shape "
       "[3, 3]",
       [](at::Device device) { quantization_loss(on(device, {2, 4}), on(device, {2, 4}), on(device, {3, 3})); }},
      // dequantize
      {Kind::kValue, "dequantize: expected codes to be a matrix [N, K], but got shape [8]",
       [](at::Device device) {
         dequantize(on(device, {8}, at::kChar), on(device, {2, 2}), on(device, {2, 2}, at::kChar), 2);
       }},
      {Kind::kType, "dequantize: expected codes to be int8, but got uint8",
       [](at::Device device) {
         dequantize(on(device, {2, 4}, at::kByte), on(device, {2, 2}), on(device, {2, 2}, at::kChar), 2);
       }},
      {Kind::kValue, "dequantize: expected group_size to be positive, or -1 for one group per row, but got 0",
       [](at::Device device) {
         dequantize(on(device, {2, 4}, at::kChar), on(device, {2, 2}), on(device, {2, 2}, at::kChar), 0);
       }},
      {Kind::kType, "dequantize: expected scales to be float32, float64, bfloat16 or float16, but got int32",
       [](at::Device device) {
         dequantize(on(device, {2, 4}, at::kChar), on(device, {2, 2}, at::kInt), on(device, {2, 2}, at::kChar), 2);
       }},
      {Kind::kValue, "dequantize: expected scales to have shape [N, groups] = [2, 2], but got shape [2, 1]",
       [](at::Device device) {
         dequantize(on(device, {2, 4}, at::kChar), on(device, {2, 1}), on(device, {2, 2}, at::kChar), 2);
       }},
      {Kind::kType, "dequantize: expected zero_points to be int8, but got float32",
       [](at::Device device) { dequantize(on(device, {2, 4}, at::kChar), on(device, {2, 2}), on(device, {2, 2}), 2); }},
      {Kind::kType, "dequantize: expected dtype to be float32, float64, bfloat16 or float16, but got int8",
       [](at::Device device) {
         dequantize(on(device, {2, 4}, at::kChar), on(device, {2, 2}), on(device, {2, 2}, at::kChar), 2, at::kChar);
       }},
      {Kind::kValue, "dequantize: expected zero_points to have shape [N, groups] = [2, 2], but got shape [2, 3]",
       [](at::Device device) {
         dequantize(on(device, {2, 4}, at::kChar), on(device, {2, 2}), on(device, {2, 3}, at::kChar), 2);
       }},
      // packing
      {Kind::kValue, "pack_int4: expected codes to be a matrix [N, K], but got shape [4]",
       [](at::Device device) { pack_int4(on(device, {4}, at::kChar)); }},
      {Kind::kType, "pack_int4: expected codes to be int8, but got int32",
       [](at::Device device) { pack_int4(on(device, {2, 4}, at::kInt)); }},
      {Kind::kValue, "pack: expected bits to be 2 to 8, but got 1",
       [](at::Device device) { pack(on(device, {2, 4}, at::kChar), 1); }},
      {Kind::kValue, "unpack_int4: expected packed to be a matrix [N, ceil(K * bits / 8)], but got shape [4]",
       [](at::Device device) { unpack_int4(on(device, {4}, at::kByte), 8); }},
      {Kind::kType, "unpack_int4: expected packed to be uint8, but got int8",
       [](at::Device device) { unpack_int4(on(device, {2, 4}, at::kChar), 8); }},
      {Kind::kValue, "unpack: expected bits to be 2 to 8, but got 9",
       [](at::Device device) { unpack(on(device, {2, 4}, at::kByte), 9, 4); }},
      {Kind::kValue, "unpack: expected columns to be 0 to 576460752303423487, but got -1",
       [](at::Device device) { unpack(on(device, {2, 4}, at::kByte), 3, -1); }},
      {Kind::kValue, "unpack: expected columns to be 0 to 576460752303423487, but got 9223372036854775807",
       [](at::Device device) { unpack(on(device, {2, 4}, at::kByte), 3, std::numeric_limits<int64_t>::max()); }},
      {Kind::kValue,
       "unpack: expected packed to have shape [N, ceil(K * bits / 8)] = [2, 5] for 11 columns of 3 bits, but got shape "
       "[2, 4]",
       [](at::Device device) { unpack(on(device, {2, 4}, at::kByte), 3, 11); }},
      {Kind::kValue,
       "unpack_int4: expected packed to have shape [N, ceil(K * bits / 8)] = [2, 3] for 6 columns of 4 bits, but got "
       "shape [2, 4]",
       [](at::Device device) { unpack_int4(on(device, {2, 4}, at::kByte), 6); }},
  };
  return table;
}

TEST(Checks, ArgumentsGetTheirMessageFromRealTensors) {
  for (const BadCall& bad : bad_arguments()) {
    EXPECT_EQ(message_of_call(bad, at::kCPU), bad.message);
  }
}

TEST(Checks, ArgumentsGetTheSameMessageFromMetaTensors) {
  for (const BadCall& bad : bad_arguments()) {
    EXPECT_EQ(message_of_call(bad, at::kMeta), bad.message);
  }
}

TEST(Checks, TensorsOfOneCallAreOnOneDevice) {
  const at::Tensor weight = on(at::kCPU, {2, 4});
  const at::Tensor codes = on(at::kCPU, {2, 4}, at::kChar);
  const at::Tensor zero_points = on(at::kCPU, {2, 2}, at::kChar);
  EXPECT_EQ(message_of<c10::ValueError>([&] { gptq(weight, on(at::kMeta, {4, 4})); }),
            "gptq: expected hessian to be on the device of weight (cpu), but got meta");
  EXPECT_EQ(message_of<c10::ValueError>([&] {
              gptq(weight, on(at::kCPU, {4, 4}),
                   with([](GptqOptions& options) { options.scales = on(at::kMeta, {2, 2}); }));
            }),
            "gptq: expected scales to be on the device of weight (cpu), but got meta");
  EXPECT_EQ(message_of<c10::ValueError>([&] {
              gptq(weight, on(at::kCPU, {4, 4}), with([](GptqOptions& options) {
                     options.scales = on(at::kCPU, {2, 2});
                     options.zero_points = on(at::kMeta, {2, 2}, at::kChar);
                   }));
            }),
            "gptq: expected zero_points to be on the device of weight (cpu), but got meta");
  EXPECT_EQ(
      message_of<c10::ValueError>([&] { quantization_loss(weight, on(at::kMeta, {2, 4}), on(at::kCPU, {4, 4})); }),
      "quantization_loss: expected dequantized to be on the device of weight (cpu), but got meta");
  EXPECT_EQ(message_of<c10::ValueError>([&] {
              at::Tensor hessian = on(at::kCPU, {4, 4});
              hessian_update_(hessian, on(at::kMeta, {3, 4}));
            }),
            "hessian_update_: expected inputs to be on the device of hessian (cpu), but got meta");
  EXPECT_EQ(message_of<c10::ValueError>([&] { dequantize(codes, on(at::kMeta, {2, 2}), zero_points, 2); }),
            "dequantize: expected scales to be on the device of codes (cpu), but got meta");
  EXPECT_EQ(message_of<c10::ValueError>(
                [&] { dequantize(codes, on(at::kCPU, {2, 2}), on(at::kMeta, {2, 2}, at::kChar), 2); }),
            "dequantize: expected zero_points to be on the device of codes (cpu), but got meta");
}

at::Tensor with_entry(at::Tensor tensor, int64_t i, int64_t j, double value) {
  tensor[i][j] = value;
  return tensor;
}

TEST(Checks, ValuesThatAreNotFinite) {
  const at::Tensor weight = at::ones({2, 4}, at::kDouble);
  const at::Tensor hessian = at::eye(4, at::kDouble);
  struct Case {
    double value;
    const char* text;
  };
  for (const Case& c : {Case{kNan, "nan"}, Case{kInf, "inf"}, Case{-kInf, "-inf"}}) {
    EXPECT_EQ(message_of<c10::ValueError>([&] { rtn(with_entry(weight.clone(), 1, 2, c.value)); }),
              std::string("rtn: expected weight to be finite, but got ") + c.text + " at [1, 2]");
    for (const testing::NamedAlgorithm& form : testing::kForms) {
      EXPECT_EQ(message_of<c10::ValueError>([&] { form.run(with_entry(weight.clone(), 0, 3, c.value), hessian, {}); }),
                std::string(form.name) + ": expected weight to be finite, but got " + c.text + " at [0, 3]");
      EXPECT_EQ(message_of<c10::ValueError>([&] { form.run(weight, with_entry(hessian.clone(), 3, 1, c.value), {}); }),
                std::string(form.name) + ": expected hessian to be finite, but got " + c.text + " at [3, 1]");
    }
    EXPECT_EQ(message_of<c10::ValueError>([&] {
                at::Tensor sum = hessian.clone();
                hessian_update_(sum, with_entry(at::ones({3, 4}), 2, 0, c.value).unsqueeze(0));
              }),
              std::string("hessian_update_: expected inputs to be finite, but got ") + c.text + " at [0, 2, 0]");
  }
}

TEST(Checks, HessianThatIsNotSymmetric) {
  EXPECT_EQ(
      message_of<c10::ValueError>(
          [] { gptq(at::ones({2, 4}, at::kDouble), with_entry(at::eye(4, at::kDouble), 0, 1, 0.5)); }),
      "gptq: expected hessian to be symmetric to within 1.49012e-08, but got 0.5 at [0, 1] and 0 at [0, 1] of its "
      "transpose");
  EXPECT_EQ(
      message_of<c10::ValueError>([] { gptq_reference(at::ones({2, 4}), with_entry(at::eye(4) * 2, 3, 2, 0.25)); }),
      "gptq_reference: expected hessian to be symmetric to within 0.000690534, but got 0 at [2, 3] and 0.25 at "
      "[2, 3] of its transpose");
  // Rounding makes the two halves of a computed product differ, which is not an error.
  EXPECT_EQ(message_of<c10::ValueError>([] { gptq(at::ones({2, 4}), with_entry(at::eye(4), 0, 1, 1e-4)); }),
            "no exception");
}

TEST(Checks, ScalesThatAreNotPositive) {
  struct Case {
    double value;
    const char* text;
  };
  for (const Case& c : {Case{0.0, "0"}, Case{-0.5, "-0.5"}, Case{kNan, "nan"}, Case{kInf, "inf"}}) {
    GridOptions options;
    options.group_size = 2;
    options.scales = with_entry(at::ones({2, 2}), 1, 0, c.value);
    EXPECT_EQ(message_of<c10::ValueError>([&] { rtn(at::ones({2, 4}), options); }),
              std::string("rtn: expected scales to be positive and finite, but got ") + c.text + " at [1, 0]");
  }
}

TEST(Checks, ZeroPointsThatAreNotCodes) {
  GridOptions options;
  options.group_size = 2;
  options.scales = at::ones({2, 2});
  options.zero_points = with_entry(at::zeros({2, 2}, at::kChar), 0, 1, 1);
  EXPECT_EQ(message_of<c10::ValueError>([&] { rtn(at::ones({2, 4}), options); }),
            "rtn: expected zero_points to be 0 where symmetric=True, but got 1 at [0, 1]");
  options.symmetric = false;
  for (const int64_t code : {-9, 8}) {
    options.zero_points = with_entry(at::zeros({2, 2}, at::kChar), 1, 1, static_cast<double>(code));
    EXPECT_EQ(message_of<c10::ValueError>([&] { rtn(at::ones({2, 4}), options); }),
              "rtn: expected zero_points to be in [-8, 7] for 4 bits, but got " + std::to_string(code) + " at [1, 1]");
  }
}

TEST(Checks, CodesThatDoNotFitFourBits) {
  for (const int64_t code : {-9, 8, 127, -128}) {
    EXPECT_EQ(message_of<c10::ValueError>(
                  [&] { pack_int4(with_entry(at::zeros({2, 4}, at::kChar), 1, 3, static_cast<double>(code))); }),
              "pack_int4: expected codes to be in [-8, 7] for 4 bits, but got " + std::to_string(code) + " at [1, 3]");
  }
}

TEST(Checks, RidgesThatOverflowOnTheHessian) {
  GptqOptions options;
  options.ridge = 1e30;
  for (const testing::NamedAlgorithm& form : testing::kForms) {
    EXPECT_EQ(
        message_of<c10::ValueError>([&] { form.run(at::ones({2, 4}), at::eye(4) * 1e10, options); }),
        std::string(form.name) +
            ": expected ridge to be at most 3.40282e+28 for a hessian with a mean diagonal of 1e+10, but got 1e+30");
    EXPECT_EQ(message_of<c10::ValueError>([&] { form.run(at::ones({2, 4}), at::eye(4) * 1e-10, options); }),
              "no exception");
  }
}

// The dispatcher has no kernel of ours for these tensors; the operators still say what they expect.
TEST(Checks, TensorsThatAreNotStrided) {
  const at::Tensor weight = at::ones({2, 4});
  const at::Tensor hessian = at::eye(4);
  const std::string expected = ": expected weight to be a dense tensor of layout Strided, but got ";
  EXPECT_EQ(message_of<c10::ValueError>([&] { rtn(weight.to_sparse()); }),
            "rtn" + expected + "a tensor of layout Sparse");
  EXPECT_EQ(message_of<c10::ValueError>([&] { gptq(weight.to_sparse_csr(), hessian); }),
            "gptq" + expected + "a tensor of layout SparseCsr");
  EXPECT_EQ(message_of<c10::ValueError>([&] { gptq(weight.to_mkldnn(), hessian); }),
            "gptq" + expected + "a tensor of layout Mkldnn");
  EXPECT_EQ(message_of<c10::ValueError>([&] { gptq(weight, hessian.to_sparse()); }),
            "gptq: expected hessian to be a dense tensor of layout Strided, but got a tensor of layout Sparse");
  EXPECT_EQ(
      message_of<c10::ValueError>([&] { quantization_loss(weight, weight.to_sparse(), hessian); }),
      "quantization_loss: expected dequantized to be a dense tensor of layout Strided, but got a tensor of layout "
      "Sparse");
  EXPECT_EQ(
      message_of<c10::ValueError>([&] {
        at::Tensor sum = at::zeros({4, 4});
        hessian_update_(sum, weight.to_sparse());
      }),
      "hessian_update_: expected inputs to be a dense tensor of layout Strided, but got a tensor of layout Sparse");
  EXPECT_EQ(message_of<c10::ValueError>([&] { rtn(at::_nested_tensor_from_tensor_list({weight[0], weight[1]})); }),
            "rtn" + expected + "a nested tensor");
  EXPECT_EQ(message_of<c10::TypeError>([&] { rtn(at::quantize_per_tensor(weight, 0.1, 0, at::kQInt8)); }),
            "rtn: expected weight to be float32, float64, bfloat16 or float16, but got qint8");
}

TEST(Checks, HessianThatIsNotPositiveDefinite) {
  for (const testing::NamedAlgorithm& form : testing::kForms) {
    EXPECT_EQ(message_of<c10::LinAlgError>([&] {
                GptqOptions options;
                options.ridge = 0;
                form.run(at::ones({2, 4}), with_entry(at::eye(4), 2, 2, -1), options);
              }),
              std::string(form.name) +
                  ": expected hessian to have a nonnegative diagonal, like every X X^T, but got -1 at [2, 2]");
  }
}

TEST(Checks, ProductsThatOverflow) {
  const at::Tensor weight = at::full({1, 4}, 1e25).mul(testing::normal({1, 4}, 1, at::kFloat));
  for (const testing::NamedAlgorithm& form : testing::kForms) {
    EXPECT_EQ(message_of<c10::ValueError>([&] { form.run(weight, at::eye(4), {}); }),
              std::string(form.name) +
                  ": expected weight and hessian whose products are finite in float32 with ridge 0.01, but got a row "
                  "loss that "
                  "is not");
  }
}

}  // namespace
}  // namespace miniquant
