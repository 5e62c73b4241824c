#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace miniquant::algorithms {

/// The lower triangle of (H + H^T) / 2, rows and columns in the order `column` (int64 [K]; natural if not defined):
/// a tensor of `dtype`, float32 or float64, laid out by kernels::TriangleLayout.
///
/// hessian: [K, K], float32 or float64, on the CPU, any strides.
at::Tensor lower_triangle(const at::Tensor& hessian, at::ScalarType dtype, const at::Tensor& column = {});

/// All of (H + H^T) / 2 with `added` on its diagonal: a tensor of `dtype`, laid out by kernels::SymmetricLayout.
///
/// hessian: as above.
at::Tensor damped_panels(const at::Tensor& hessian, double added, at::ScalarType dtype);

/// A copy of the diagonal, [K], of a triangle of K = `columns` columns.
at::Tensor diagonal_of_triangle(const at::Tensor& triangle, int64_t columns);

/// Sets a triangle's diagonal, [K].
void set_diagonal_of_triangle(const at::Tensor& triangle, const at::Tensor& diagonal);

/// What is to be known of a matrix before it is taken for symmetric.
struct SymmetrySurvey {
  bool finite = true;
  double largest = 0.0;            ///< max |H_ij|, if finite
  double largest_asymmetry = 0.0;  ///< max |H_ij - H_ji|, if finite
};

/// One pass over `hessian` [K, K], float32 or float64, on any device.
SymmetrySurvey survey_symmetry(const at::Tensor& hessian);

}  // namespace miniquant::algorithms
