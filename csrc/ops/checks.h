#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/core/SymInt.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "miniquant/options.h"
#include "ops/signature.h"

// Argument checks of the operators, made before memory is touched. Messages read
//   <op>: expected <argument> <requirement>, but got <value>
// A wrong dtype is a TypeError, anything else a ValueError.
//
// check_*_arguments read only shapes, dtypes, devices and options, of real and Meta tensors alike, so a fake tensor
// gets the message of a real one. check_*_values read the data.

namespace miniquant::ops {

/// Checks that a tensor is on the CPU, for operators that are implemented for the CPU only.
void check_on_cpu(const char* op, const char* argument, const at::Tensor& tensor);

std::string name_of(at::ScalarType dtype);

/// "<value> at [i, j]" for the first element for which `bad` is true.
std::string first_value(const at::Tensor& tensor, const at::Tensor& bad);

/// Checks that every element is finite.
void check_finite(const char* op, const char* argument, const at::Tensor& tensor);

/// The number of groups in a row of `columns`; group_size is already checked.
c10::SymInt groups_per_row(int64_t group_size, const c10::SymInt& columns);

/// Checks the arguments, and returns them as options.
GridOptions check_rtn_arguments(const char* op, const at::Tensor& weight, const GridArguments& grid);
void check_rtn_values(const char* op, const at::Tensor& weight, const GridArguments& grid);

/// Checks the arguments, and returns them as options.
GptqOptions check_gptq_arguments(const char* op, const at::Tensor& weight, const at::Tensor& hessian,
                                 const GridArguments& grid, const SweepArguments& sweep);
/// The same for gptq_reference, which lacks some options.
GptqOptions check_gptq_reference_arguments(const at::Tensor& weight, const at::Tensor& hessian,
                                           const GridArguments& grid, const SweepArguments& sweep);
void check_gptq_values(const char* op, const at::Tensor& weight, const at::Tensor& hessian, const GridArguments& grid,
                       const SweepArguments& sweep);

/// The arguments of rtn_superblocks and gptq_superblocks that are the type's.
struct SuperblockArguments {
  SuperblockType type;
  GridArguments grid;
};
/// The grid of a type's groups: bits, columns per group, symmetric or not. Throws c10::ValueError for another name.
std::tuple<int64_t, int64_t, bool> superblock_grid(std::string_view kind);
/// Checks the weight's shape and the name of a type.
SuperblockArguments check_superblock_arguments(const char* op, const at::Tensor& weight, std::string_view kind,
                                               std::string_view scale_method);

/// Checks the arguments, and returns them as options.
GridOptions check_choose_ridge_arguments(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second,
                                         int64_t tokens, const GridArguments& grid);
void check_choose_ridge_values(const at::Tensor& weight, const at::Tensor& first, const at::Tensor& second);

void check_hessian_update_arguments(const at::Tensor& hessian, const at::Tensor& inputs,
                                    const std::optional<at::Tensor>& token_weights);
void check_product_update_arguments(const at::Tensor& sum, const at::Tensor& left, const at::Tensor& right);
/// Checks inputs [..., K] of a sum [K, K]; `sum` is the name of the sum in messages.
void check_inputs_of(const char* op, const at::Tensor& inputs, const char* sum, const at::Tensor& hessian);
/// Checks that a tensor has one value for each token of inputs [..., K].
void check_of_tokens(const char* op, const char* argument, const at::Tensor& tensor, const at::Tensor& inputs);
void check_token_weights(const char* op, const std::optional<at::Tensor>& token_weights, const at::Tensor& inputs);

void check_quantization_loss_arguments(const at::Tensor& weight, const at::Tensor& dequantized,
                                       const at::Tensor& hessian);

void check_dequantize_arguments(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                                int64_t group_size, std::optional<at::ScalarType> dtype);

/// The number of bytes of a packed row of `columns` codes.
c10::SymInt packed_bytes(const c10::SymInt& columns, int64_t bits);
void check_pack_arguments(const char* op, const at::Tensor& codes, int64_t bits);
void check_pack_values(const char* op, const at::Tensor& codes, int64_t bits);
void check_unpack_arguments(const char* op, const at::Tensor& packed, int64_t bits, const c10::SymInt& columns);

}  // namespace miniquant::ops
