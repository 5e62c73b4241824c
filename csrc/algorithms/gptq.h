#pragma once

#include <ATen/core/Tensor.h>

#include "miniquant/options.h"

namespace miniquant::algorithms {

/// The fast form. Arguments as miniquant::gptq, already checked; a GptqOptions without given scales computes them.
GptqResult gptq(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options);

/// The textbook form, on any device. Arguments likewise.
GptqResult gptq_reference(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options);

}  // namespace miniquant::algorithms
