#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>

#include "algorithms/finite.h"
#include "algorithms/gptq.h"
#include "algorithms/loss.h"
#include "algorithms/packing.h"
#include "algorithms/ridge.h"
#include "algorithms/rtn.h"
#include "algorithms/superblocks.h"
#include "ops/checks.h"
#include "ops/plain_operations.h"
#include "ops/results.h"

// The operators on real tensors: check, then call the algorithm. Operators made of ATen operations alone work on every
// device, the others on the CPU only.

namespace miniquant::ops {
namespace {

QuantizedTuple rtn(const at::Tensor& weight, const GridArguments& grid) {
  const PlainOperations plain;
  const GridOptions options = check_rtn_arguments("rtn", weight, grid);
  check_on_cpu("rtn", "weight", weight);
  check_rtn_values("rtn", weight, grid);
  const QuantizedWeight result = algorithms::rtn(weight, options);
  return {result.codes, result.scales, result.zero_points};
}

void check_row_loss(const char* op, const at::Tensor& row_loss, double ridge) {
  TORCH_CHECK_VALUE(algorithms::all_finite(row_loss), op, ": expected weight and hessian whose products are finite in ",
                    c10::getDtypeNames(row_loss.scalar_type()).first, " with ridge ", ridge,
                    ", but got a row loss that is not");
}

GptqTuple checked(const char* op, const GptqResult& result, double ridge) {
  check_row_loss(op, result.row_loss, ridge);
  return {result.codes, result.scales, result.zero_points, result.row_loss};
}

GptqTuple gptq(const at::Tensor& weight, const at::Tensor& hessian, const GridArguments& grid,
               const SweepArguments& sweep) {
  const PlainOperations plain;
  const GptqOptions options = check_gptq_arguments("gptq", weight, hessian, grid, sweep);
  check_on_cpu("gptq", "weight", weight);
  check_gptq_values("gptq", weight, hessian, grid, sweep);
  return checked("gptq", algorithms::gptq(weight, hessian, options), sweep.ridge);
}

GptqTuple gptq_reference(const at::Tensor& weight, const at::Tensor& hessian, const GridArguments& grid,
                         const SweepArguments& sweep) {
  const PlainOperations plain;
  const GptqOptions options = check_gptq_reference_arguments(weight, hessian, grid, sweep);
  check_gptq_values("gptq_reference", weight, hessian, grid, sweep);
  return checked("gptq_reference", algorithms::gptq_reference(weight, hessian, options), sweep.ridge);
}

SuperblockTuple rtn_superblocks(const at::Tensor& weight, std::string_view kind) {
  const PlainOperations plain;
  const SuperblockArguments of_type = check_superblock_arguments("rtn_superblocks", weight, kind, "absmax");
  check_on_cpu("rtn_superblocks", "weight", weight);
  check_rtn_values("rtn_superblocks", weight, of_type.grid);
  const SuperblockWeight result = algorithms::rtn_superblocks(weight, of_type.type);
  return {result.codes, result.scales, result.zero_points, result.minima, result.super_scales, result.super_minima};
}

SuperblockGptqTuple gptq_superblocks(const at::Tensor& weight, const at::Tensor& hessian, std::string_view kind,
                                     std::string_view scale_method, const SweepArguments& sweep) {
  constexpr const char* op = "gptq_superblocks";
  const PlainOperations plain;
  const SuperblockArguments of_type = check_superblock_arguments(op, weight, kind, scale_method);
  const GptqOptions options = check_gptq_arguments(op, weight, hessian, of_type.grid, sweep);
  check_on_cpu(op, "weight", weight);
  check_gptq_values(op, weight, hessian, of_type.grid, sweep);
  const SuperblockResult result = algorithms::gptq_superblocks(weight, hessian, of_type.type, options);
  check_row_loss(op, result.row_loss, sweep.ridge);
  return {result.codes,        result.scales,       result.zero_points, result.minima,
          result.super_scales, result.super_minima, result.row_loss};
}

RidgeTuple choose_ridge(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second, int64_t tokens,
                        int64_t bits, int64_t group_size, bool symmetric) {
  const PlainOperations plain;
  const GridOptions options = check_choose_ridge_arguments(
      weight, first, second, tokens, {bits, group_size, symmetric, std::nullopt, std::nullopt, false, "absmax", {}});
  check_on_cpu("choose_ridge", "weight", weight);
  check_choose_ridge_values(weight, first, second);
  const algorithms::JudgedRidges judged = algorithms::judged_ridges(tokens, weight.size(1));
  const at::Tensor& ridges = judged.ridges;
  const at::Tensor losses = algorithms::judge_ridges(weight, first, second, judged, options);
  const at::Tensor ridge =
      ridges
          .index(
              {losses.masked_fill(losses.eq(algorithms::kNotTried), std::numeric_limits<double>::infinity()).argmin()})
          .clone();
  return {ridge, ridges, losses, algorithms::fallbacks_of(ridge)};
}

at::Tensor quantization_loss(const at::Tensor& weight, const at::Tensor& dequantized, const at::Tensor& hessian) {
  const PlainOperations plain;
  check_quantization_loss_arguments(weight, dequantized, hessian);
  check_on_cpu("quantization_loss", "weight", weight);
  return algorithms::quantization_loss(weight, dequantized, hessian);
}

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                      int64_t group_size, std::optional<at::ScalarType> dtype) {
  const PlainOperations plain;
  check_dequantize_arguments(codes, scales, zero_points, group_size, dtype);
  return algorithms::dequantize(codes, scales, zero_points, group_size, dtype);
}

at::Tensor pack_as(const char* op, const at::Tensor& codes, int64_t bits) {
  check_pack_arguments(op, codes, bits);
  check_pack_values(op, codes, bits);
  return algorithms::pack(codes, bits);
}

at::Tensor unpack_as(const char* op, const at::Tensor& packed, int64_t bits, const c10::SymInt& columns) {
  check_unpack_arguments(op, packed, bits, columns);
  return algorithms::unpack(packed, bits, columns.guard_int(__FILE__, __LINE__));
}

at::Tensor pack(const at::Tensor& codes, int64_t bits) { return pack_as("pack", codes, bits); }

at::Tensor pack_int4(const at::Tensor& codes) { return pack_as("pack_int4", codes, 4); }

// Registration takes a SymInt by value only.
// NOLINTBEGIN(performance-unnecessary-value-param)
at::Tensor unpack(const at::Tensor& packed, int64_t bits, c10::SymInt columns) {
  return unpack_as("unpack", packed, bits, columns);
}

at::Tensor unpack_int4(const at::Tensor& packed, c10::SymInt columns) {
  return unpack_as("unpack_int4", packed, 4, columns);
}
// NOLINTEND(performance-unnecessary-value-param)

/// For every device and layout, so the operator itself rejects what it does not support, not the dispatcher.
void implement(torch::Library& m) {
  m.impl("rtn", rtn_operator<rtn>);
  m.impl("gptq", gptq_operator<gptq>);
  m.impl("gptq_reference", gptq_operator<gptq_reference>);
  m.impl("rtn_superblocks", rtn_superblocks);
  m.impl("gptq_superblocks", gptq_superblocks_operator<gptq_superblocks>);
  m.impl("choose_ridge", choose_ridge);
  m.impl("quantization_loss", quantization_loss);
  m.impl("dequantize", dequantize);
  m.impl("pack", pack);
  m.impl("unpack", unpack);
  m.impl("pack_int4", pack_int4);
  m.impl("unpack_int4", unpack_int4);
}

}  // namespace
}  // namespace miniquant::ops

TORCH_LIBRARY_IMPL(miniquant, CompositeExplicitAutograd, m) { miniquant::ops::implement(m); }
// The one kind of tensor that the key above does not cover.
TORCH_LIBRARY_IMPL(miniquant, NestedTensorCPU, m) { miniquant::ops::implement(m); }
