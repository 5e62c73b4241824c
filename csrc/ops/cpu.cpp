#include <ATen/core/grad_mode.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "algorithms/gptq.h"
#include "algorithms/hessian.h"
#include "algorithms/loss.h"
#include "algorithms/packing.h"
#include "algorithms/ridge.h"
#include "algorithms/rtn.h"
#include "ops/checks.h"
#include "ops/results.h"

// The operators on real tensors: check, then call the algorithm. What is made of ATen operations alone is registered
// for every device.

namespace miniquant::ops {
namespace {

/// For one scope ATen's operations record nothing for autograd and compute in the dtype they are given: under autocast
/// products would be bfloat16.
class PlainOperations {
 private:
  at::NoGradGuard no_grad_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

using Algorithm = GptqResult (*)(const at::Tensor&, const at::Tensor&, const GptqOptions&);

QuantizedTuple rtn(const at::Tensor& weight, int64_t bits, int64_t group_size, bool symmetric,
                   const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& zero_points,
                   bool full_range, std::string_view scale_method) {
  const PlainOperations plain;
  const GridArguments grid{bits, group_size, symmetric, scales, zero_points, full_range, scale_method};
  const GridOptions options = check_rtn_arguments("rtn", weight, grid);
  check_rtn_values("rtn", weight, grid);
  const QuantizedWeight result = algorithms::rtn(weight, options);
  return {result.codes, result.scales, result.zero_points};
}

GptqTuple run_gptq(const char* op, Algorithm algorithm, const at::Tensor& weight, const at::Tensor& hessian,
                   const GridArguments& grid, const GptqOptions& options) {
  const PlainOperations plain;
  check_gptq_values(op, weight, hessian, grid);
  const GptqResult result = algorithm(weight, hessian, options);
  TORCH_CHECK_VALUE(result.row_loss.isfinite().all().item<bool>(), op,
                    ": expected weight and hessian whose products are finite in ",
                    c10::getDtypeNames(result.row_loss.scalar_type()).first, ", but got a row loss that is not");
  return {result.codes, result.scales, result.zero_points, result.row_loss};
}

GptqTuple gptq(const at::Tensor& weight, const at::Tensor& hessian, int64_t bits, int64_t group_size, bool symmetric,
               double ridge, int64_t block_size, std::string_view group_scales, std::string_view column_order,
               const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& zero_points, bool full_range,
               std::string_view scale_method, int64_t refine, int64_t beam_scales) {
  const GridArguments grid{bits, group_size, symmetric, scales, zero_points, full_range, scale_method};
  const GptqOptions options = check_gptq_arguments(
      "gptq", weight, hessian, grid, {ridge, block_size, group_scales, column_order, refine, beam_scales});
  return run_gptq("gptq", algorithms::gptq, weight, hessian, grid, options);
}

GptqTuple gptq_reference(const at::Tensor& weight, const at::Tensor& hessian, int64_t bits, int64_t group_size,
                         bool symmetric, double ridge, int64_t block_size, std::string_view group_scales,
                         std::string_view column_order, const std::optional<at::Tensor>& scales,
                         const std::optional<at::Tensor>& zero_points, bool full_range, std::string_view scale_method,
                         int64_t refine, int64_t beam_scales) {
  const GridArguments grid{bits, group_size, symmetric, scales, zero_points, full_range, scale_method};
  const GptqOptions options = check_gptq_reference_arguments(
      weight, hessian, grid, {ridge, block_size, group_scales, column_order, refine, beam_scales});
  return run_gptq("gptq_reference", algorithms::gptq_reference, weight, hessian, grid, options);
}

RidgeTuple choose_ridge(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second, int64_t tokens,
                        int64_t bits, int64_t group_size, bool symmetric) {
  const PlainOperations plain;
  const GridOptions options = check_choose_ridge_arguments(
      weight, first, second, tokens, {bits, group_size, symmetric, std::nullopt, std::nullopt, false, "absmax"});
  check_choose_ridge_values(weight, first, second);
  const at::Tensor ridges = algorithms::judged_ridges(tokens, weight.size(1));
  const at::Tensor losses = algorithms::judge_ridges(weight, first, second, ridges, options);
  return {ridges.index({losses.argmin()}).clone(), ridges, losses};
}

void hessian_update_(at::Tensor& hessian, const at::Tensor& inputs) {
  const PlainOperations plain;
  check_hessian_update_arguments(hessian, inputs);
  check_hessian_update_values(inputs);
  algorithms::hessian_update(hessian, inputs);
  // Autograd sees the change: no generated kernel above this one counts it.
  hessian.unsafeGetTensorImpl()->bump_version();
}

at::Tensor quantization_loss(const at::Tensor& weight, const at::Tensor& dequantized, const at::Tensor& hessian) {
  const PlainOperations plain;
  check_quantization_loss_arguments(weight, dequantized, hessian);
  return algorithms::quantization_loss(weight, dequantized, hessian);
}

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                      int64_t group_size) {
  const PlainOperations plain;
  check_dequantize_arguments(codes, scales, zero_points, group_size);
  return algorithms::dequantize(codes, scales, zero_points, group_size);
}

at::Tensor pack_int4(const at::Tensor& codes) {
  check_pack_int4_arguments(codes);
  check_pack_int4_values(codes);
  return algorithms::pack_int4(codes);
}

// Registration takes a SymInt by value only.
// NOLINTNEXTLINE(performance-unnecessary-value-param)
at::Tensor unpack_int4(const at::Tensor& packed, c10::SymInt columns) {
  check_unpack_int4_arguments(packed, columns);
  return algorithms::unpack_int4(packed, columns.guard_int(__FILE__, __LINE__));
}

}  // namespace
}  // namespace miniquant::ops

TORCH_LIBRARY_IMPL(miniquant, CPU, m) {
  m.impl("rtn", miniquant::ops::rtn);
  m.impl("gptq", miniquant::ops::gptq);
  m.impl("choose_ridge", miniquant::ops::choose_ridge);
  m.impl("hessian_update_", miniquant::ops::hessian_update_);
  m.impl("quantization_loss", miniquant::ops::quantization_loss);
}

TORCH_LIBRARY_IMPL(miniquant, CompositeExplicitAutograd, m) {
  m.impl("gptq_reference", miniquant::ops::gptq_reference);
  m.impl("dequantize", miniquant::ops::dequantize);
  m.impl("pack_int4", miniquant::ops::pack_int4);
  m.impl("unpack_int4", miniquant::ops::unpack_int4);
}
