#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "ops/names.h"
#include "ops/results.h"

// The long signatures in four forms that must agree: the text of the schema, the struct of arguments, the function that
// the dispatcher calls, and the call from C++. An option has one line in each form.

namespace miniquant::ops {

using OptionalTensor = const std::optional<at::Tensor>&;

/// The arguments of the grid, as in kGridSchema.
struct GridArguments {
  int64_t bits;
  int64_t group_size;
  bool symmetric;
  OptionalTensor scales;
  OptionalTensor zero_points;
  bool full_range;
  std::string_view scale_method;
  std::optional<at::ScalarType> scale_dtype;
};

inline constexpr const char* kGridSchema =
    "int bits=4, int group_size=64, bool symmetric=True, Tensor? scales=None, Tensor? zero_points=None, "
    "bool full_range=False, str scale_method=\"absmax\", ScalarType? scale_dtype=None";

/// The arguments of gptq besides those of the grid, as in kSweepSchema.
struct SweepArguments {
  double ridge;
  int64_t block_size;
  std::string_view group_scales;
  std::string_view column_order;
  int64_t refine;
  int64_t beam_scales;
};

inline constexpr const char* kSweepSchema =
    "float ridge=0.01, int block_size=128, str group_scales=\"static\", str column_order=\"natural\", int refine=0, "
    "int beam_scales=0";

/// rtn as the dispatcher calls it: rtn(Tensor weight, *, <kGridSchema>).
template <QuantizedTuple (*implementation)(const at::Tensor& weight, const GridArguments& grid)>
QuantizedTuple rtn_operator(const at::Tensor& weight, int64_t bits, int64_t group_size, bool symmetric,
                            OptionalTensor scales, OptionalTensor zero_points, bool full_range,
                            std::string_view scale_method, std::optional<at::ScalarType> scale_dtype) {
  return implementation(weight,
                        {bits, group_size, symmetric, scales, zero_points, full_range, scale_method, scale_dtype});
}
using RtnSignature = decltype(rtn_operator<nullptr>);

inline QuantizedTuple call_rtn(const c10::TypedOperatorHandle<RtnSignature>& op, const at::Tensor& weight,
                               const GridOptions& grid) {
  return op.call(weight, grid.bits, grid.group_size, grid.symmetric, grid.scales, grid.zero_points, grid.full_range,
                 name_of_choice(grid.scale_method), grid.scale_dtype);
}

/// gptq and gptq_reference as the dispatcher calls them: gptq(Tensor weight, Tensor hessian, *, <kGridSchema>,
/// <kSweepSchema>).
template <GptqTuple (*implementation)(const at::Tensor& weight, const at::Tensor& hessian, const GridArguments& grid,
                                      const SweepArguments& sweep)>
GptqTuple gptq_operator(const at::Tensor& weight, const at::Tensor& hessian, int64_t bits, int64_t group_size,
                        bool symmetric, OptionalTensor scales, OptionalTensor zero_points, bool full_range,
                        std::string_view scale_method, std::optional<at::ScalarType> scale_dtype, double ridge,
                        int64_t block_size, std::string_view group_scales, std::string_view column_order,
                        int64_t refine, int64_t beam_scales) {
  return implementation(weight, hessian,
                        {bits, group_size, symmetric, scales, zero_points, full_range, scale_method, scale_dtype},
                        {ridge, block_size, group_scales, column_order, refine, beam_scales});
}
using GptqSignature = decltype(gptq_operator<nullptr>);

inline GptqTuple call_gptq(const c10::TypedOperatorHandle<GptqSignature>& op, const at::Tensor& weight,
                           const at::Tensor& hessian, const GptqOptions& options) {
  return op.call(weight, hessian, options.bits, options.group_size, options.symmetric, options.scales,
                 options.zero_points, options.full_range, name_of_choice(options.scale_method), options.scale_dtype,
                 options.ridge, options.block_size, name_of_choice(options.group_scales),
                 name_of_choice(options.column_order), options.refine, options.beam_scales);
}

/// gptq_superblocks as the dispatcher calls it: gptq_superblocks(Tensor weight, Tensor hessian, str kind, *,
/// str scale_method, <kSweepSchema>).
template <SuperblockGptqTuple (*implementation)(const at::Tensor& weight, const at::Tensor& hessian,
                                                std::string_view kind, std::string_view scale_method,
                                                const SweepArguments& sweep)>
SuperblockGptqTuple gptq_superblocks_operator(const at::Tensor& weight, const at::Tensor& hessian,
                                              std::string_view kind, std::string_view scale_method, double ridge,
                                              int64_t block_size, std::string_view group_scales,
                                              std::string_view column_order, int64_t refine, int64_t beam_scales) {
  return implementation(weight, hessian, kind, scale_method,
                        {ridge, block_size, group_scales, column_order, refine, beam_scales});
}
using GptqSuperblocksSignature = decltype(gptq_superblocks_operator<nullptr>);

inline SuperblockGptqTuple call_gptq_superblocks(const c10::TypedOperatorHandle<GptqSuperblocksSignature>& op,
                                                 const at::Tensor& weight, const at::Tensor& hessian,
                                                 SuperblockType type, const GptqOptions& options) {
  return op.call(weight, hessian, name_of_choice(type), name_of_choice(options.scale_method), options.ridge,
                 options.block_size, name_of_choice(options.group_scales), name_of_choice(options.column_order),
                 options.refine, options.beam_scales);
}

}  // namespace miniquant::ops
