#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace miniquant::algorithms {

/// The lower triangle of factor * (H + H^T) / 2, rows and columns in the order `column` (int64 [K]; natural if not
/// defined): a tensor of `dtype`, float32 or float64, laid out by kernels::TriangleLayout.
///
/// hessian: [K, K], float32 or float64, on the CPU, any strides. factor: a power of two, a normal number of its dtype.
at::Tensor lower_triangle(const at::Tensor& hessian, double factor, at::ScalarType dtype,
                          const at::Tensor& column = {});

/// lower_triangle() in natural order, whose rows are set later, a panel's rows at a time and on any thread.
class LowerTriangleRows {
 public:
  /// diagonal: [K], of `dtype`: takes the place of that of the average. Other arguments as above.
  LowerTriangleRows(const at::Tensor& hessian, double factor, at::ScalarType dtype, at::Tensor diagonal);

  /// The triangle; rows that are not set yet are undefined.
  [[nodiscard]] const at::Tensor& triangle() const { return triangle_; }

  /// Sets the rows that the diagonal block of a panel has.
  void set(int64_t panel) const;

 private:
  at::Tensor hessian_;
  double factor_;
  at::Tensor diagonal_;
  at::Tensor triangle_;
};

/// All of factor * (H + H^T) / 2: a tensor of `dtype`, laid out by kernels::SymmetricLayout. Arguments as above.
at::Tensor symmetric_panels(const at::Tensor& hessian, double factor, at::ScalarType dtype);

/// Adds to the diagonal of the panels of K = `columns` columns.
void add_to_diagonal_of_panels(at::Tensor& panels, int64_t columns, double added);

/// A copy of the diagonal, [K], of a triangle of K = `columns` columns.
at::Tensor diagonal_of_triangle(const at::Tensor& triangle, int64_t columns);

/// Sets the diagonal of a triangle from `diagonal` [K].
void set_diagonal_of_triangle(const at::Tensor& triangle, const at::Tensor& diagonal);

/// The figures that decide whether a matrix counts as finite and symmetric.
struct SymmetrySurvey {
  bool finite = true;
  double largest = 0.0;            ///< max |H_ij|, if finite
  double largest_asymmetry = 0.0;  ///< max |H_ij - H_ji|, if finite
};

/// One pass over `hessian` [K, K], float32 or float64, on any device.
SymmetrySurvey survey_symmetry(const at::Tensor& hessian);

}  // namespace miniquant::algorithms
