#include "algorithms/damping.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace miniquant::algorithms {

DampedHessian damp(const at::Tensor& hessian, double ridge, at::ScalarType dtype) {
  const at::Tensor h = hessian.to(dtype);
  at::Tensor matrix = (h + h.mT()) / 2;
  const double mean = matrix.size(0) == 0 ? 0.0 : h.diagonal().to(at::kDouble).mean().item<double>();
  const double added = ridge * mean;
  matrix.diagonal().add_(added);
  return {matrix, ridge, added};
}

at::Tensor with_dead_inputs_decoupled(const at::Tensor& matrix) {
  at::Tensor decoupled = matrix.clone();
  at::Tensor diagonal = decoupled.diagonal();
  diagonal.copy_(at::where(diagonal == 0, at::ones_like(diagonal), diagonal));
  return decoupled;
}

void throw_not_positive_definite(const char* op, const DampedHessian& damped) {
  const at::Tensor matrix = with_dead_inputs_decoupled(damped.matrix.to(at::kDouble));
  const auto leading_minor = std::get<1>(at::linalg_cholesky_ex(matrix)).item<int64_t>();
  const std::string minor = leading_minor > 0
                                ? "the leading minor of order " + std::to_string(leading_minor) + " is not"
                                : "it is not to working precision (all leading minors are positive in float64)";
  const double next_ridge = std::max(0.1, damped.ridge * 10);
  TORCH_CHECK_LINALG(false, op, ": expected hessian to be positive definite with ridge=", damped.ridge, " (",
                     damped.added, " added to its diagonal), but ", minor, "; try ridge=", next_ridge);
}

}  // namespace miniquant::algorithms
