#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

namespace miniquant::algorithms {

/// Factors A = L^T L, L lower triangular, in place: with R = L^T this is A = R R^T, R upper triangular.
///
/// triangle: the lower triangle of A [K, K], K = `columns`, float32 or float64, as kernels::TriangleLayout lays it out.
/// Returns whether it succeeded; where it did not, A is not positive definite to working precision and the contents are
/// undefined.
///
/// set_rows: if given, the rows of A that the diagonal block of a panel has are not there until set_rows(panel) sets
/// them, the panels from last to first and on any thread.
///
/// Blocked and left-looking, from the last row up; gives the same bits for any number of threads. (Golub and Van Loan,
/// Matrix Computations, 4.2, with rows and columns in reverse.)
[[nodiscard]] bool factor_from_last_row(const at::Tensor& triangle, int64_t columns,
                                        const std::function<void(int64_t panel)>& set_rows = {});

}  // namespace miniquant::algorithms
