#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

#include "algorithms/grid.h"
#include "algorithms/ridge.h"
#include "algorithms/superblocks.h"
#include "ops/checks.h"
#include "ops/results.h"

// The operators on tensors without data: the same checks; only the shapes and dtypes of results are computed.

namespace miniquant::ops {
namespace {

QuantizedTuple empty_quantized(const at::Tensor& weight, const GridArguments& grid) {
  const c10::SymInt rows = weight.sym_size(0);
  const c10::SymInt groups = groups_per_row(grid.group_size, weight.sym_size(1));
  const auto bytes = weight.options().dtype(at::kChar);
  const auto scales = weight.options().dtype(grid.scale_dtype.value_or(weight.scalar_type()));
  return {at::empty_symint({rows, weight.sym_size(1)}, bytes), at::empty_symint({rows, groups}, scales),
          at::empty_symint({rows, groups}, bytes)};
}

QuantizedTuple meta_rtn(const at::Tensor& weight, const GridArguments& grid) {
  check_rtn_arguments("rtn", weight, grid);
  return empty_quantized(weight, grid);
}

GptqTuple empty_gptq(const at::Tensor& weight, const GridArguments& grid) {
  auto [codes, scales, zero_points] = empty_quantized(weight, grid);
  const auto options = weight.options().dtype(algorithms::compute_dtype(weight.scalar_type()));
  return {codes, scales, zero_points, at::empty_symint({weight.sym_size(0)}, options)};
}

GptqTuple meta_gptq(const at::Tensor& weight, const at::Tensor& hessian, const GridArguments& grid,
                    const SweepArguments& sweep) {
  check_gptq_arguments("gptq", weight, hessian, grid, sweep);
  return empty_gptq(weight, grid);
}

GptqTuple meta_gptq_reference(const at::Tensor& weight, const at::Tensor& hessian, const GridArguments& grid,
                              const SweepArguments& sweep) {
  check_gptq_reference_arguments(weight, hessian, grid, sweep);
  return empty_gptq(weight, grid);
}

SuperblockTuple empty_superblocks(const at::Tensor& weight, const GridArguments& grid) {
  auto [codes, scales, zero_points] = empty_quantized(weight, grid);
  const auto halves = weight.options().dtype(at::kHalf);
  const auto supers = [&] {
    return at::empty_symint({weight.sym_size(0), weight.sym_size(1) / algorithms::kSuperblockColumns}, halves);
  };
  return {codes, scales, zero_points, at::empty_like(scales), supers(), supers()};
}

SuperblockTuple meta_rtn_superblocks(const at::Tensor& weight, std::string_view kind) {
  return empty_superblocks(weight, check_superblock_arguments("rtn_superblocks", weight, kind, "absmax").grid);
}

SuperblockGptqTuple meta_gptq_superblocks(const at::Tensor& weight, const at::Tensor& hessian, std::string_view kind,
                                          std::string_view scale_method, const SweepArguments& sweep) {
  constexpr const char* op = "gptq_superblocks";
  const SuperblockArguments of_type = check_superblock_arguments(op, weight, kind, scale_method);
  check_gptq_arguments(op, weight, hessian, of_type.grid, sweep);
  const auto losses = weight.options().dtype(algorithms::compute_dtype(weight.scalar_type()));
  return std::tuple_cat(empty_superblocks(weight, of_type.grid),
                        std::make_tuple(at::empty_symint({weight.sym_size(0)}, losses)));
}

RidgeTuple meta_choose_ridge(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second,
                             int64_t tokens, int64_t bits, int64_t group_size, bool symmetric) {
  check_choose_ridge_arguments(weight, first, second, tokens,
                               {bits, group_size, symmetric, std::nullopt, std::nullopt, false, "absmax", {}});
  const auto options = weight.options().dtype(at::kDouble);
  return {at::empty({}, options), at::empty({algorithms::kJudgedRidges}, options),
          at::empty({algorithms::kJudgedRidges}, options), at::empty({algorithms::kFallbacks}, options)};
}

at::Tensor meta_quantization_loss(const at::Tensor& weight, const at::Tensor& dequantized, const at::Tensor& hessian) {
  check_quantization_loss_arguments(weight, dequantized, hessian);
  return at::empty_symint({weight.sym_size(0)},
                          weight.options().dtype(algorithms::compute_dtype(weight.scalar_type())));
}

at::Tensor meta_dequantize(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                           int64_t group_size, std::optional<at::ScalarType> dtype) {
  check_dequantize_arguments(codes, scales, zero_points, group_size, dtype);
  return at::empty_symint(codes.sym_sizes(), scales.options().dtype(dtype.value_or(scales.scalar_type())));
}

at::Tensor empty_packed(const char* op, const at::Tensor& codes, int64_t bits) {
  check_pack_arguments(op, codes, bits);
  return at::empty_symint({codes.sym_size(0), packed_bytes(codes.sym_size(1), bits)}, codes.options().dtype(at::kByte));
}

at::Tensor empty_unpacked(const char* op, const at::Tensor& packed, int64_t bits, c10::SymInt columns) {
  check_unpack_arguments(op, packed, bits, columns);
  return at::empty_symint({packed.sym_size(0), std::move(columns)}, packed.options().dtype(at::kChar));
}

at::Tensor meta_pack(const at::Tensor& codes, int64_t bits) { return empty_packed("pack", codes, bits); }

at::Tensor meta_pack_int4(const at::Tensor& codes) { return empty_packed("pack_int4", codes, 4); }

at::Tensor meta_unpack(const at::Tensor& packed, int64_t bits, c10::SymInt columns) {
  return empty_unpacked("unpack", packed, bits, std::move(columns));
}

at::Tensor meta_unpack_int4(const at::Tensor& packed, c10::SymInt columns) {
  return empty_unpacked("unpack_int4", packed, 4, std::move(columns));
}

}  // namespace
}  // namespace miniquant::ops

TORCH_LIBRARY_IMPL(miniquant, Meta, m) {
  m.impl("rtn", miniquant::ops::rtn_operator<miniquant::ops::meta_rtn>);
  m.impl("gptq", miniquant::ops::gptq_operator<miniquant::ops::meta_gptq>);
  m.impl("gptq_reference", miniquant::ops::gptq_operator<miniquant::ops::meta_gptq_reference>);
  m.impl("rtn_superblocks", miniquant::ops::meta_rtn_superblocks);
  m.impl("gptq_superblocks", miniquant::ops::gptq_superblocks_operator<miniquant::ops::meta_gptq_superblocks>);
  m.impl("choose_ridge", miniquant::ops::meta_choose_ridge);
  m.impl("quantization_loss", miniquant::ops::meta_quantization_loss);
  m.impl("dequantize", miniquant::ops::meta_dequantize);
  m.impl("pack", miniquant::ops::meta_pack);
  m.impl("unpack", miniquant::ops::meta_unpack);
  m.impl("pack_int4", miniquant::ops::meta_pack_int4);
  m.impl("unpack_int4", miniquant::ops::meta_unpack_int4);
}
