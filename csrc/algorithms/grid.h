#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "miniquant/options.h"

namespace miniquant::algorithms {

/// float64 for float64, otherwise float32: bfloat16 and float16 are computed in float32.
at::ScalarType compute_dtype(at::ScalarType dtype);

/// The codes of a grid of `bits` bits: [-q, q] with q = 2^(bits-1) - 1, or [-2^(bits-1), q] if asymmetric or
/// `full_range`.
kernels::CodeRange code_range(int64_t bits, bool symmetric, bool full_range);

/// The smallest scale used in dtype `stored`, so a group that is not all 0 never gets scale 0.
double smallest_scale(at::ScalarType stored);

/// The largest scale of dtype `stored` whose product with `levels` (at least 1) is finite in that dtype.
double largest_scale(at::ScalarType stored, int32_t levels);

/// Columns per group in rows of K = `columns`: `group_size`, or K for -1 or a longer group; at least 1.
int64_t columns_per_group(int64_t group_size, int64_t columns);

/// ceil(columns / columns_per_group).
int64_t groups_per_row(int64_t group_size, int64_t columns);

/// A weight [N, K] as the kernels take it: contiguous, in the compute dtype, each row divided by its unit, a power of
/// two. The unit is 1 where squares and products of the row stay in the range of the dtype; otherwise it brings the
/// row's largest weight near 1. Dividing by it is exact, so codes do not depend on the scale of a weight.
struct ScaledWeight {
  at::Tensor values;     ///< [N, K]
  at::Tensor units;      ///< [N], compute dtype; undefined where every unit is 1
  at::Tensor exponents;  ///< int64 [N], log2 of the units; undefined where every unit is 1
};

/// weight: as miniquant::rtn, on any device. scales: the given ones, if any, which must stay in range in the row's
/// units, too.
ScaledWeight scaled_weight(const at::Tensor& weight, const std::optional<at::Tensor>& scales);

/// What a two-level grid has beside its scales, as kernels::StepsView: compute dtype [N, groups], in units of the row.
struct GridSteps {
  at::Tensor scales;    ///< steps of the scales
  at::Tensor minimums;  ///< steps of the minima; undefined where there are none
  at::Tensor minima;    ///< undefined where there are none
  int32_t lowest = 0;
  int32_t highest = 0;
};

/// The codes, scales and zero points of a weight while they are computed: contiguous, scales in the compute dtype.
struct Grid {
  kernels::CodeRange range;
  int64_t group_size;      ///< columns per group
  at::ScalarType stored;   ///< the dtype scales are rounded to and returned in
  at::Tensor codes;        ///< int8 [N, K]
  at::Tensor scales;       ///< [N, groups], compute dtype, in units of the row
  at::Tensor zero_points;  ///< int8 [N, groups]
  at::Tensor units;        ///< [N], of ScaledWeight
  at::Tensor held;         ///< [N, groups, 2], kernels::GridView::held; undefined where all may be clipped
  GridSteps steps;         ///< read by refine() only
  [[nodiscard]] at::Tensor stored_scales() const;
};

/// A grid for `weight` without codes. Scales and zero points are the given ones, or not yet set. units: [N], of
/// ScaledWeight.
Grid make_grid(const at::Tensor& weight, const GridOptions& options, const at::Tensor& units = {});

/// Keeps the scales of `grid` from clipping the columns `dead` (int64 [D]) of `weight` [N, K] (ScaledWeight::values),
/// on the CPU: no search sees in H what their weights will multiply.
void hold_dead_inputs(const at::Tensor& dead, const at::Tensor& weight, Grid& grid);

/// The weight [N, K] that codes times scales come near: with the minima added, where the grid has such.
at::Tensor with_minima(const at::Tensor& weight, const Grid& grid);

/// The kernels' view of a grid; T is its compute dtype.
template <typename T>
kernels::GridView<T> view(const Grid& grid);

/// The factors that a search for a scale applies to the range of a group: 1 first, which wins ties. For a full range in
/// both signs where that pays.
template <typename T>
std::vector<T> scale_factors(const kernels::CodeRange& range, ScaleMethod method);

/// Computes scales and zero points from each group of a weight, by any method but kLoss.
template <typename T>
class ScalesOfRows {
 public:
  /// weight: [N, K], ScaledWeight::values. importance: [K], read by kHessian only: the weight of each column's squared
  /// error. `grid` and `weight` outlive this object.
  ScalesOfRows(const Grid& grid, const at::Tensor& weight, ScaleMethod method, const at::Tensor& importance);

  /// Sets those of rows [row_begin, row_end); row_begin is a multiple of the kernels' tile_rows.
  void set(int64_t row_begin, int64_t row_end) const;

  /// Approximate multiply-adds per row.
  [[nodiscard]] int64_t operations() const { return columns_ * static_cast<int64_t>(factors_.size()); }

 private:
  kernels::GridView<T> grid_;
  const T* weight_;
  int64_t columns_;
  ScaleMethod method_;
  at::Tensor importance_;
  std::vector<T> factors_;
};

/// Sets the scales and zero points of all rows by ScalesOfRows. Arguments as there.
void compute_scales(Grid& grid, const at::Tensor& weight, ScaleMethod method, const at::Tensor& importance = {});

}  // namespace miniquant::algorithms
