#include "algorithms/damping.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "algorithms/symmetric.h"

namespace miniquant::algorithms {
double added_to_diagonal(const at::Tensor& hessian, double ridge) {
  return hessian.size(0) == 0 ? 0.0 : ridge * hessian.diagonal().to(at::kDouble).mean().item<double>();
}

at::Tensor damped_lower_triangle(const at::Tensor& hessian, double added, at::ScalarType dtype,
                                 const at::Tensor& column) {
  const at::Tensor triangle = lower_triangle(hessian, dtype, column);
  at::Tensor diagonal = diagonal_of_triangle(triangle, hessian.size(0));
  diagonal.add_(added);
  diagonal.masked_fill_(diagonal == 0, 1);
  set_diagonal_of_triangle(triangle, diagonal);
  return triangle;
}

DampedHessian damp(const at::Tensor& hessian, double ridge, at::ScalarType dtype) {
  const at::Tensor h = hessian.to(dtype);
  at::Tensor matrix = (h + h.mT()) / 2;
  const double added = added_to_diagonal(h, ridge);
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
