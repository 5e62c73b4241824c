#pragma once

#include <ATen/core/Tensor.h>

namespace miniquant::algorithms {

/// Factors matrix = L^T L, L lower triangular, in place: with R = L^T this is matrix = R R^T, R upper triangular.
///
/// matrix: [K, K], float64, contiguous; only its lower triangle is read and written. Returns whether it succeeded;
/// where it did not, the matrix is not positive definite to working precision and its contents are undefined.
///
/// Blocked, right-looking, from the last row up; the same bits for any number of threads. (Golub and Van Loan,
/// Matrix Computations, 4.2, with rows and columns in reverse.)
[[nodiscard]] bool factor_from_last_row(const at::Tensor& matrix);

}  // namespace miniquant::algorithms
