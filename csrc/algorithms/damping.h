#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace miniquant::algorithms {

/// Damping of a Hessian. It is computed here only; all code that reads the damped H takes it from here.
///
/// Solvers read D = ((H + H^T) / 2 + ridge * mean(diag H) * I) / 2^exponent, with an even exponent and a largest
/// diagonal entry in [1, 4). Dividing by a power of two is exact, and so is the square root of a power of four. So
/// codes do not depend on the scale of H, and no product of a very large or very small H leaves the range of the
/// compute dtype. A loss with D, times 2^exponent, is the loss with the damped H.
struct Damping {
  double ridge = 0.0;   ///< as given: relative to the mean diagonal
  double added = 0.0;   ///< added to each diagonal entry of H / 2^exponent
  double factor = 1.0;  ///< 2^-exponent
  int exponent = 0;
};

/// hessian: [K, K], float32 or float64, on any device.
Damping damping_of(const at::Tensor& hessian, double ridge);

/// D [K, K] in `dtype`, on the Hessian's device.
at::Tensor damped_matrix(const at::Tensor& hessian, const Damping& damping, at::ScalarType dtype);

/// diag D, float64 [K].
at::Tensor damped_diagonal(const at::Tensor& hessian, const Damping& damping);

/// D as lower_triangle() lays it out, rows and columns in the order `column` (natural if not defined).
/// hessian: on the CPU.
at::Tensor damped_lower_triangle(const at::Tensor& hessian, const Damping& damping, at::ScalarType dtype,
                                 const at::Tensor& column = {});

/// The diagonal of damped_lower_triangle(), `dtype` [K]. Arguments as above.
at::Tensor diagonal_of_damped_triangle(const at::Tensor& hessian, const Damping& damping, at::ScalarType dtype,
                                       const at::Tensor& column = {});

/// D as symmetric_panels() lays it out. hessian: on the CPU.
at::Tensor damped_panels(const at::Tensor& hessian, const Damping& damping, at::ScalarType dtype);

/// Dead inputs, int64 [D], ascending: inputs that are 0 in every token, so their row and column of H are 0.
at::Tensor dead_inputs(const at::Tensor& hessian);

/// Throws the c10::LinAlgError of `op` where `hessian` has a negative diagonal entry, whatever the ridge: no X X^T has
/// one. argument: the name of the Hessian in the message.
void check_diagonal_not_negative(const char* op, const char* argument, const at::Tensor& hessian);

/// Throws as below where nothing is added to the diagonal and it has a 0 in a row that is not 0.
void check_dead_inputs(const char* op, const at::Tensor& hessian, const Damping& damping);

/// Throws the c10::LinAlgError of `op` for a damped Hessian that is not positive definite. The message names an input
/// whose diagonal entry is 0 and whose row is not, otherwise the first leading minor that is not positive; the ridge
/// used; and a ridge to try, if one can help.
[[noreturn]] void throw_not_positive_definite(const char* op, const at::Tensor& hessian, const Damping& damping);

}  // namespace miniquant::algorithms
