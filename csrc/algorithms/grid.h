#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "kernels/kernels.h"

namespace miniquant::algorithms {

/// float64 for float64, else float32: bfloat16 and float16 are computed in float32.
at::ScalarType compute_dtype(at::ScalarType dtype);

/// The codes of a grid of `bits` bits: [-q, q] with q = 2^(bits-1) - 1, or [-2^(bits-1), q] if asymmetric.
kernels::CodeRange code_range(int64_t bits, bool symmetric);

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
Grid make_grid(const at::Tensor& weight, int64_t bits, int64_t group_size, bool symmetric,
               const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& zero_points);

/// The kernels' view of a grid; T is its compute dtype.
template <typename T>
kernels::GridView<T> view(const Grid& grid);

/// Sets scales and zero points from the range of each group of `weight` [N, K] (compute dtype, contiguous).
void compute_scales(Grid& grid, const at::Tensor& weight);

}  // namespace miniquant::algorithms
