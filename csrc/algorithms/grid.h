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

/// The largest scale of dtype `stored` of which `levels` (at least 1) multiples are finite in it.
double largest_scale(at::ScalarType stored, int32_t levels);

/// Columns per group where a row has K = `columns`: `group_size`, or all of them for -1 or a longer group; at least 1.
int64_t columns_per_group(int64_t group_size, int64_t columns);

/// ceil(columns / columns_per_group).
int64_t groups_per_row(int64_t group_size, int64_t columns);

/// A weight [N, K] as the kernels see it: in the compute dtype, contiguous, each row a multiple of a power of two, its
/// unit. Units are 1 where squares and products of the row stay in the range of the dtype anyway; elsewhere a unit
/// brings the row's largest weight near 1. Dividing by it is exact, so codes do not depend on the scale of a weight.
struct ScaledWeight {
  at::Tensor values;     ///< [N, K]
  at::Tensor units;      ///< [N], compute dtype; undefined where every unit is 1
  at::Tensor exponents;  ///< int64 [N], log2 of the units; undefined likewise
};

/// weight: as miniquant::rtn, on any device. scales: given ones, which a unit must not bring out of range either.
ScaledWeight scaled_weight(const at::Tensor& weight, const std::optional<at::Tensor>& scales);

/// A weight's codes, scales and zero points while they are being computed: contiguous, scales in the compute dtype.
struct Grid {
  kernels::CodeRange range;
  int64_t group_size;      ///< columns per group
  at::ScalarType stored;   ///< the dtype scales are rounded to and returned in
  at::Tensor codes;        ///< int8 [N, K]
  at::Tensor scales;       ///< [N, groups], compute dtype, multiples of the row's unit
  at::Tensor zero_points;  ///< int8 [N, groups]
  at::Tensor units;        ///< [N], of ScaledWeight
  at::Tensor held;         ///< [N, groups, 2], kernels::GridView::held; undefined where all may be clipped
  [[nodiscard]] at::Tensor stored_scales() const;
};

/// A grid for `weight` with codes not yet set. Scales and zero points are the given ones, or not yet set.
/// units: [N], of ScaledWeight.
Grid make_grid(const at::Tensor& weight, const GridOptions& options, const at::Tensor& units = {});

/// Keeps the scales of `grid` from clipping the columns `dead` (int64 [D]) of `weight` [N, K] (ScaledWeight::values), on
/// the CPU: no search sees in H what their weights will multiply.
void hold_dead_inputs(const at::Tensor& dead, const at::Tensor& weight, Grid& grid);

/// The kernels' view of a grid; T is its compute dtype.
template <typename T>
kernels::GridView<T> view(const Grid& grid);

/// What the range of a group is multiplied by in a search for its scale: 1 first, so that nothing else is taken without
/// need. In both signs for a grid of either sign.
template <typename T>
std::vector<T> scale_factors(const kernels::CodeRange& range, ScaleMethod method);

/// Sets scales and zero points from each group of `weight` [N, K] (ScaledWeight::values), by any method but kLoss.
/// importance: [K], read by kHessian only: the weight of each column's squared error.
void compute_scales(Grid& grid, const at::Tensor& weight, ScaleMethod method, const at::Tensor& importance = {});

}  // namespace miniquant::algorithms
