#include <ATen/core/dispatch/Dispatcher.h>

#include <string_view>
#include <tuple>

#include "miniquant/miniquant.h"

// The C++ functions: each calls its operator through the dispatcher, so that C++ and Python get the same checks.

namespace miniquant {
namespace {

using Grid = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Gptq = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using OptionalTensor = const std::optional<at::Tensor>&;
using GptqSignature = Gptq(const at::Tensor&, const at::Tensor&, int64_t, int64_t, bool, double, int64_t,
                           std::string_view, std::string_view, OptionalTensor, OptionalTensor, bool, std::string_view,
                           int64_t, int64_t);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

GptqResult call(const c10::TypedOperatorHandle<GptqSignature>& op, const at::Tensor& weight, const at::Tensor& hessian,
                const GptqOptions& options) {
  auto [codes, scales, zero_points, row_loss] =
      op.call(weight, hessian, options.bits, options.group_size, options.symmetric, options.ridge, options.block_size,
              name_of(options.group_scales), name_of(options.column_order), options.scales, options.zero_points,
              options.full_range, name_of(options.scale_method), options.refine, options.beam_scales);
  return {{codes, scales, zero_points}, row_loss};
}

}  // namespace

QuantizedWeight rtn(const at::Tensor& weight, const GridOptions& options) {
  static const auto op =
      find<Grid(const at::Tensor&, int64_t, int64_t, bool, OptionalTensor, OptionalTensor, bool, std::string_view)>(
          "miniquant::rtn");
  auto [codes, scales, zero_points] =
      op.call(weight, options.bits, options.group_size, options.symmetric, options.scales, options.zero_points,
              options.full_range, name_of(options.scale_method));
  return {codes, scales, zero_points};
}

GptqResult gptq(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options) {
  static const auto op = find<GptqSignature>("miniquant::gptq");
  return call(op, weight, hessian, options);
}

GptqResult gptq_reference(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options) {
  static const auto op = find<GptqSignature>("miniquant::gptq_reference");
  return call(op, weight, hessian, options);
}

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                      int64_t group_size) {
  static const auto op =
      find<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t)>("miniquant::dequantize");
  return op.call(codes, scales, zero_points, group_size);
}

at::Tensor& hessian_update_(at::Tensor& hessian, const at::Tensor& inputs) {
  static const auto op = find<void(at::Tensor&, const at::Tensor&)>("miniquant::hessian_update_");
  op.call(hessian, inputs);
  return hessian;
}

at::Tensor quantization_loss(const at::Tensor& weight, const at::Tensor& dequantized, const at::Tensor& hessian) {
  static const auto op =
      find<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>("miniquant::quantization_loss");
  return op.call(weight, dequantized, hessian);
}

at::Tensor pack_int4(const at::Tensor& codes) {
  static const auto op = find<at::Tensor(const at::Tensor&)>("miniquant::pack_int4");
  return op.call(codes);
}

at::Tensor unpack_int4(const at::Tensor& packed, int64_t columns) {
  static const auto op = find<at::Tensor(const at::Tensor&, c10::SymInt)>("miniquant::unpack_int4");
  return op.call(packed, columns);
}

}  // namespace miniquant
