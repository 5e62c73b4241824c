#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace miniquant::algorithms {

/// The Hessian as the solvers see it.
struct DampedHessian {
  at::Tensor matrix;   ///< [K, K]: (H + H^T) / 2 + added * I
  double ridge = 0.0;  ///< as asked for, relative to the mean diagonal
  double added = 0.0;  ///< ridge * mean(diag H)
};

/// ridge * mean(diag H): what damping adds to each diagonal entry of `hessian` [K, K].
double added_to_diagonal(const at::Tensor& hessian, double ridge);

/// Damps `hessian` [K, K] in `dtype`, on its device.
DampedHessian damp(const at::Tensor& hessian, double ridge, at::ScalarType dtype);

/// `matrix` with 1 on every diagonal entry that is 0: an input that is always 0 and got no ridge has a zero row and
/// column, and any positive pivot leaves it decoupled, so that its weights are rounded to nearest.
at::Tensor with_dead_inputs_decoupled(const at::Tensor& matrix);

/// lower_triangle() of the damped `hessian` [K, K] (float32 or float64, on the CPU) with dead inputs decoupled.
at::Tensor damped_lower_triangle(const at::Tensor& hessian, double added, at::ScalarType dtype,
                                 const at::Tensor& column);

/// Throws the c10::LinAlgError of `op` for a damped Hessian whose Cholesky factorization failed, naming the first
/// leading minor that is not positive definite, the ridge used and what to try.
[[noreturn]] void throw_not_positive_definite(const char* op, const DampedHessian& damped);

}  // namespace miniquant::algorithms
