#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <string_view>

#include "algorithms/superblocks.h"
#include "miniquant/miniquant.h"
#include "ops/find_operator.h"
#include "ops/names.h"
#include "ops/results.h"
#include "ops/signature.h"

// The C++ functions: each calls its operator through the dispatcher, so C++ and Python get the same checks.

namespace miniquant {
namespace {

GptqResult call(const c10::TypedOperatorHandle<ops::GptqSignature>& op, const at::Tensor& weight,
                const at::Tensor& hessian, const GptqOptions& options) {
  auto [codes, scales, zero_points, row_loss] = ops::call_gptq(op, weight, hessian, options);
  const QuantizationGrid& kind = options;
  return {{kind, codes, scales, zero_points}, row_loss};
}

}  // namespace

QuantizedWeight rtn(const at::Tensor& weight, const GridOptions& options) {
  static const auto op = ops::find_operator<ops::RtnSignature>("miniquant::rtn");
  auto [codes, scales, zero_points] = ops::call_rtn(op, weight, options);
  const QuantizationGrid& kind = options;
  return {kind, codes, scales, zero_points};
}

GptqResult gptq(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options) {
  static const auto op = ops::find_operator<ops::GptqSignature>("miniquant::gptq");
  return call(op, weight, hessian, options);
}

GptqResult gptq_reference(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options) {
  static const auto op = ops::find_operator<ops::GptqSignature>("miniquant::gptq_reference");
  return call(op, weight, hessian, options);
}

SuperblockWeight rtn_superblocks(const at::Tensor& weight, SuperblockType type) {
  static const auto op =
      ops::find_operator<ops::SuperblockTuple(const at::Tensor&, std::string_view)>("miniquant::rtn_superblocks");
  auto [codes, scales, zero_points, minima, super_scales, super_minima] = op.call(weight, ops::name_of_choice(type));
  return {{algorithms::grid_of(type), codes, scales, zero_points}, minima, super_scales, super_minima};
}

SuperblockResult gptq_superblocks(const at::Tensor& weight, const at::Tensor& hessian, SuperblockType type,
                                  const GptqOptions& options) {
  static const auto op = ops::find_operator<ops::GptqSuperblocksSignature>("miniquant::gptq_superblocks");
  auto [codes, scales, zero_points, minima, super_scales, super_minima, row_loss] =
      ops::call_gptq_superblocks(op, weight, hessian, type, options);
  return {{{algorithms::grid_of(type), codes, scales, zero_points}, minima, super_scales, super_minima}, row_loss};
}

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                      int64_t group_size, std::optional<at::ScalarType> dtype) {
  static const auto op = ops::find_operator<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
                                                       std::optional<at::ScalarType>)>("miniquant::dequantize");
  return op.call(codes, scales, zero_points, group_size, dtype);
}

at::Tensor dequantize(const QuantizedWeight& quantized, std::optional<at::ScalarType> dtype) {
  return dequantize(quantized.codes, quantized.scales, quantized.zero_points, quantized.group_size, dtype);
}

at::Tensor dequantize(const SuperblockWeight& quantized) {
  const at::Tensor minima = quantized.minima.repeat_interleave(quantized.group_size, /*dim=*/1);
  return dequantize(quantized.codes, quantized.scales, quantized.zero_points, quantized.group_size, at::kFloat) -
         minima;
}

at::Tensor& hessian_update_(at::Tensor& hessian, const at::Tensor& inputs,
                            const std::optional<at::Tensor>& token_weights, HessianPrecision precision) {
  static const auto op =
      ops::find_operator<void(at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view)>(
          "miniquant::hessian_update_");
  op.call(hessian, inputs, token_weights, name_of(precision));
  return hessian;
}

at::Tensor& product_update_(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
  static const auto op =
      ops::find_operator<void(at::Tensor&, const at::Tensor&, const at::Tensor&)>("miniquant::product_update_");
  op.call(sum, left, right);
  return sum;
}

at::Tensor quantization_loss(const at::Tensor& weight, const at::Tensor& dequantized, const at::Tensor& hessian) {
  static const auto op = ops::find_operator<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>(
      "miniquant::quantization_loss");
  return op.call(weight, dequantized, hessian);
}

at::Tensor pack(const at::Tensor& codes, int64_t bits) {
  static const auto op = ops::find_operator<at::Tensor(const at::Tensor&, int64_t)>("miniquant::pack");
  return op.call(codes, bits);
}

at::Tensor unpack(const at::Tensor& packed, int64_t bits, int64_t columns) {
  static const auto op = ops::find_operator<at::Tensor(const at::Tensor&, int64_t, c10::SymInt)>("miniquant::unpack");
  return op.call(packed, bits, columns);
}

at::Tensor quantization_loss(const at::Tensor& weight, const QuantizedWeight& quantized, const at::Tensor& hessian) {
  const bool wide = weight.scalar_type() == at::kDouble || quantized.scales.scalar_type() == at::kDouble;
  return quantization_loss(weight, dequantize(quantized, wide ? at::kDouble : at::kFloat), hessian);
}

at::Tensor pack_int4(const at::Tensor& codes) {
  static const auto op = ops::find_operator<at::Tensor(const at::Tensor&)>("miniquant::pack_int4");
  return op.call(codes);
}

at::Tensor unpack_int4(const at::Tensor& packed, int64_t columns) {
  static const auto op = ops::find_operator<at::Tensor(const at::Tensor&, c10::SymInt)>("miniquant::unpack_int4");
  return op.call(packed, columns);
}

}  // namespace miniquant
