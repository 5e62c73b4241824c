#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "miniquant/options.h"

namespace miniquant::algorithms {

/// float64 for float64, else float32: bfloat16 and float16 are computed in float32.
at::ScalarType compute_dtype(at::ScalarType dtype);

/// The codes of a grid of `bits` bits: [-q, q] with q = 2^(bits-1) - 1, or [-2^(bits-1), q] if asymmetric.
/// `full_range`: [-2^(bits-1), q], symmetric.
kernels::CodeRange code_range(int64_t bits, bool symmetric, bool full_range);

/// The smallest scale kept in dtype `stored`: a group that is not all 0 never gets scale 0.
double smallest_scale(at::ScalarType stored);

/// Columns per group where a row has K = `columns`: `group_size`, or all of them for -1 or a longer group; at least 1.
int64_t columns_per_group(int64_t group_size, int64_t columns);

/// ceil(columns / columns_per_group).
int64_t groups_per_row(int64_t group_size, int64_t columns);

/// A weight's codes, scales and zero points while they are being computed: contiguous, scales in the compute dtype.
struct Grid {
  kernels::CodeRange range;
  int64_t group_size;      ///< columns per group
  at::ScalarType stored;   ///< the dtype scales are rounded to and returned in
  at::Tensor codes;        ///< int8 [N, K]
  at::Tensor scales;       ///< [N, groups], compute dtype
  at::Tensor zero_points;  ///< int8 [N, groups]
  [[nodiscard]] at::Tensor stored_scales() const;
};

/// A grid for `weight` with codes not yet set. Scales and zero points are the given ones, or not yet set.
Grid make_grid(const at::Tensor& weight, const GridOptions& options);

/// The kernels' view of a grid; T is its compute dtype.
template <typename T>
kernels::GridView<T> view(const Grid& grid);

/// What the range of a group is multiplied by in a search for its scale: 1 first, so that nothing else is taken without
/// need. In both signs for a grid of either sign.
template <typename T>
std::vector<T> scale_factors(const kernels::CodeRange& range, ScaleMethod method);

/// Sets scales and zero points from each group of `weight` [N, K] (compute dtype, contiguous), by any method but kLoss.
/// hessian: [K, K], needed for kHessian only.
void compute_scales(Grid& grid, const at::Tensor& weight, ScaleMethod method, const at::Tensor& hessian = {});

}  // namespace miniquant::algorithms
