#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/core/SymInt.h>

#include <cstdint>
#include <optional>
#include <string>

#include "miniquant/options.h"
#include "ops/signature.h"

// What the operators check before they touch memory. Messages read
//   <op>: expected <argument> <requirement>, but got <value>
// Wrong dtypes are TypeErrors, all else ValueErrors.
//
// check_*_arguments look at shapes, dtypes, devices and options only and serve real and Meta tensors alike, so a fake
// tensor gets the message that a real tensor would get. check_*_values read the data.

namespace miniquant::ops {

/// What an operator that is implemented for the CPU alone asks of a tensor.
void check_on_cpu(const char* op, const char* argument, const at::Tensor& tensor);

std::string name_of(at::ScalarType dtype);

/// "<value> at [i, j]" for the first element for which `bad` is true.
std::string first_value(const at::Tensor& tensor, const at::Tensor& bad);

/// Groups of a row of `columns`, where group_size has been checked.
c10::SymInt groups_per_row(int64_t group_size, const c10::SymInt& columns);

/// Returns the options that the arguments name.
GridOptions check_rtn_arguments(const char* op, const at::Tensor& weight, const GridArguments& grid);
void check_rtn_values(const char* op, const at::Tensor& weight, const GridArguments& grid);

/// Returns the options that the arguments name.
GptqOptions check_gptq_arguments(const char* op, const at::Tensor& weight, const at::Tensor& hessian,
                                 const GridArguments& grid, const SweepArguments& sweep);
/// The same, without what gptq_reference does not have.
GptqOptions check_gptq_reference_arguments(const at::Tensor& weight, const at::Tensor& hessian,
                                           const GridArguments& grid, const SweepArguments& sweep);
void check_gptq_values(const char* op, const at::Tensor& weight, const at::Tensor& hessian, const GridArguments& grid,
                       const SweepArguments& sweep);

/// Returns the options that the arguments name.
GridOptions check_choose_ridge_arguments(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second,
                                         int64_t tokens, const GridArguments& grid);
void check_choose_ridge_values(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second);

void check_hessian_update_arguments(const at::Tensor& hessian, const at::Tensor& inputs);
/// inputs [..., K] of a sum [K, K]; `sum` names it in messages.
void check_inputs_of(const char* op, const at::Tensor& inputs, const char* sum, const at::Tensor& hessian);

void check_quantization_loss_arguments(const at::Tensor& weight, const at::Tensor& dequantized,
                                       const at::Tensor& hessian);

void check_dequantize_arguments(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                                int64_t group_size, std::optional<at::ScalarType> dtype);

/// Bytes of a row of `columns` codes.
c10::SymInt packed_bytes(const c10::SymInt& columns, int64_t bits);
void check_pack_arguments(const char* op, const at::Tensor& codes, int64_t bits);
void check_pack_values(const char* op, const at::Tensor& codes, int64_t bits);
void check_unpack_arguments(const char* op, const at::Tensor& packed, int64_t bits, const c10::SymInt& columns);

}  // namespace miniquant::ops
