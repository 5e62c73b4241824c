#pragma once

#include <ATen/core/Tensor.h>

#include "miniquant/options.h"

namespace miniquant::algorithms {

/// The fast form. Arguments as miniquant::gptq, already checked.
GptqResult gptq(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options);

/// The textbook form, on any device. Arguments as miniquant::gptq_reference, already checked.
GptqResult gptq_reference(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options);

}  // namespace miniquant::algorithms
