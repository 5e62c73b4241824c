#include "algorithms/damping.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "algorithms/symmetric.h"

namespace miniquant::algorithms {
namespace {

/// The exponent of the power of two that a Hessian is divided by: that of its largest diagonal entry after damping,
/// rounded down to an even number so square roots of 2^exponent are exact. 2^-exponent is a normal number of the
/// Hessian's dtype, in which H is multiplied by it.
int exponent_of(const at::Tensor& hessian, double ridge) {
  const double largest = hessian.size(0) == 0 ? 0.0 : hessian.diagonal().max().to(at::kDouble).item<double>();
  if (!(largest > 0)) {
    return 0;
  }
  const int limit = hessian.scalar_type() == at::kDouble ? 1020 : 124;
  const int of_ridge = ridge > 1 ? std::ilogb(ridge) : 0;
  const int exponent = std::clamp(std::ilogb(largest) + of_ridge, -limit, limit);
  return exponent - (exponent % 2 != 0 ? 1 : 0);
}

/// [D]: inputs whose diagonal entry is 0: with `coupled`, those that have another entry in their row or column that is
/// not 0; otherwise those that have none.
at::Tensor inputs_of_zero_diagonal(const at::Tensor& hessian, bool coupled) {
  at::Tensor zero = hessian.diagonal().eq(0).nonzero().flatten();
  if (zero.numel() == 0) {
    return zero;
  }
  const at::Tensor couplings = hessian.index_select(0, zero).ne(0).logical_or(hessian.index_select(1, zero).mT().ne(0));
  return zero.masked_select(couplings.any(1).eq(coupled));
}

/// Why a damped Hessian is not positive definite.
std::string what_fails(const at::Tensor& hessian, const Damping& damping) {
  const at::Tensor coupled = inputs_of_zero_diagonal(hessian, /*coupled=*/true);
  if (coupled.numel() > 0) {
    const auto input = coupled[0].item<int64_t>();
    const at::Tensor row = (hessian.select(0, input) / 2 + hessian.select(1, input) / 2);
    const at::Tensor other = row.abs().argmax();
    return c10::str("it has 0 at [", input, ", ", input, "] and ", row[other.item<int64_t>()].item<double>(), " at [",
                    input, ", ", other.item<int64_t>(), "], but the row of an input that is always 0 must be all 0");
  }
  at::Tensor matrix = damped_matrix(hessian, damping, at::kDouble);
  matrix.diagonal().masked_fill_(matrix.diagonal() == 0, 1);
  const auto leading_minor = std::get<1>(at::linalg_cholesky_ex(matrix)).item<int64_t>();
  return leading_minor > 0 ? c10::str("the leading minor of order ", leading_minor, " is not")
                           : "it is not to working precision (all leading minors are positive in float64)";
}

/// A hint with a ridge that may help; "" where the mean diagonal is not positive, because no ridge helps there.
std::string what_to_try(const at::Tensor& hessian, const Damping& damping) {
  constexpr double kUsualRidge = 0.01;
  if (!(hessian.diagonal().to(at::kDouble).max().item<double>() > 0) || damping.added < 0) {
    return "";
  }
  return c10::str("; try ridge=", damping.ridge > 0 ? 10 * damping.ridge : kUsualRidge);
}

}  // namespace

Damping damping_of(const at::Tensor& hessian, double ridge) {
  Damping damping{.ridge = ridge, .exponent = exponent_of(hessian, ridge)};
  damping.factor = std::ldexp(1.0, -damping.exponent);
  if (hessian.size(0) > 0) {
    const at::Tensor diagonal = hessian.diagonal().to(at::kDouble);
    const double mean = diagonal.mean().item<double>();
    // Scaled before the mean is taken if the sum of the diagonal overflows.
    damping.added =
        ridge * (std::isfinite(mean) ? mean * damping.factor : diagonal.mul(damping.factor).mean().item<double>());
  }
  return damping;
}

at::Tensor damped_matrix(const at::Tensor& hessian, const Damping& damping, at::ScalarType dtype) {
  // Multiplied before the cast: a value of float64 may be out of the range of float32.
  const at::Tensor h = (hessian * damping.factor).to(dtype);
  at::Tensor matrix = (h + h.mT()) / 2;
  matrix.diagonal().add_(damping.added);
  return matrix;
}

at::Tensor damped_diagonal(const at::Tensor& hessian, const Damping& damping) {
  return hessian.diagonal().to(at::kDouble).mul(damping.factor).add(damping.added);
}

at::Tensor damped_lower_triangle(const at::Tensor& hessian, const Damping& damping, at::ScalarType dtype,
                                 const at::Tensor& column) {
  const at::Tensor triangle = lower_triangle(hessian, damping.factor, dtype, column);
  set_diagonal_of_triangle(triangle, diagonal_of_damped_triangle(hessian, damping, dtype, column));
  return triangle;
}

at::Tensor diagonal_of_damped_triangle(const at::Tensor& hessian, const Damping& damping, at::ScalarType dtype,
                                       const at::Tensor& column) {
  // Multiplied before the cast: a value of float64 may be out of the range of float32.
  const at::ScalarType wider = c10::promoteTypes(hessian.scalar_type(), dtype);
  const at::Tensor diagonal = hessian.diagonal().to(wider).mul(damping.factor).to(dtype).add_(damping.added);
  return column.defined() ? diagonal.index_select(0, column) : diagonal;
}

at::Tensor damped_panels(const at::Tensor& hessian, const Damping& damping, at::ScalarType dtype) {
  at::Tensor panels = symmetric_panels(hessian, damping.factor, dtype);
  add_to_diagonal_of_panels(panels, hessian.size(0), damping.added);
  return panels;
}

at::Tensor dead_inputs(const at::Tensor& hessian) { return inputs_of_zero_diagonal(hessian, /*coupled=*/false); }

void check_diagonal_not_negative(const char* op, const char* argument, const at::Tensor& hessian) {
  const at::Tensor negative = hessian.diagonal().lt(0).nonzero();
  if (negative.numel() > 0) {
    const auto input = negative[0].item<int64_t>();
    TORCH_CHECK_LINALG(false, op, ": expected ", argument, " to have a nonnegative diagonal, like every X X^T, but ",
                       "got ", hessian[input][input].item<double>(), " at [", input, ", ", input, "]");
  }
}

void check_dead_inputs(const char* op, const at::Tensor& hessian, const Damping& damping) {
  if (damping.added == 0 && inputs_of_zero_diagonal(hessian, /*coupled=*/true).numel() > 0) {
    throw_not_positive_definite(op, hessian, damping);
  }
}

void throw_not_positive_definite(const char* op, const at::Tensor& hessian, const Damping& damping) {
  TORCH_CHECK_LINALG(false, op, ": expected hessian to be positive definite with ridge=", damping.ridge, " (",
                     std::ldexp(damping.added, damping.exponent), " added to its diagonal), but ",
                     what_fails(hessian, damping), what_to_try(hessian, damping));
}

}  // namespace miniquant::algorithms
