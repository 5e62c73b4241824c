#pragma once

#include <ATen/core/Tensor.h>

#include "miniquant/options.h"

namespace miniquant::algorithms {

/// The fast form. Arguments as miniquant::gptq, already checked; a GptqOptions without given scales computes them.
GptqResult gptq(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options);

/// The textbook form, on any device. Arguments likewise.
GptqResult gptq_reference(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options);

/// [K] int64: the stored column that each step quantizes. Only kGroup looks at `group_size` (-1: one group).
at::Tensor order_of_columns(const at::Tensor& hessian, ColumnOrder order, int64_t group_size);

}  // namespace miniquant::algorithms
