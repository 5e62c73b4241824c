#include "algorithms/grid.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "algorithms/dispatch.h"

namespace miniquant::algorithms {
namespace {

template <typename T, typename Stored>
T round_scale(T scale) {
  static const T smallest = static_cast<T>(smallest_scale(c10::CppTypeToScalarType<Stored>::value));
  return std::max(static_cast<T>(static_cast<Stored>(scale)), smallest);
}

/// float64 is computed in float64 alone; everything else in float32.
template <typename T>
kernels::RoundScale<T> round_scale_to(at::ScalarType stored) {
  if constexpr (std::is_same_v<T, float>) {
    if (stored == at::kBFloat16) {
      return round_scale<float, c10::BFloat16>;
    }
    if (stored == at::kHalf) {
      return round_scale<float, c10::Half>;
    }
  }
  return round_scale<T, T>;
}

}  // namespace

at::ScalarType compute_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

kernels::CodeRange code_range(int64_t bits, bool symmetric) {
  const auto half = static_cast<int32_t>(1U << static_cast<unsigned>(bits - 1));
  return {symmetric ? 1 - half : -half, half - 1, symmetric};
}

double smallest_scale(at::ScalarType stored) {
  switch (stored) {
    case at::kHalf:
      return 0x1p-24;  // subnormal: the normal range of float16 ends above the scales of small weights
    case at::kDouble:
      return std::numeric_limits<double>::min();
    default:
      return std::numeric_limits<float>::min();  // of bfloat16, too
  }
}

int64_t columns_per_group(int64_t group_size, int64_t columns) {
  const int64_t row = std::max<int64_t>(columns, 1);
  return group_size == -1 ? row : std::min(group_size, row);
}

int64_t groups_per_row(int64_t group_size, int64_t columns) {
  const int64_t group_columns = columns_per_group(group_size, columns);
  return columns / group_columns + (columns % group_columns != 0 ? 1 : 0);
}

at::Tensor Grid::stored_scales() const { return scales.to(stored); }

Grid make_grid(const at::Tensor& weight, int64_t bits, int64_t group_size, bool symmetric,
               const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& zero_points) {
  const int64_t rows = weight.size(0);
  const int64_t columns = weight.size(1);
  const int64_t groups = groups_per_row(group_size, columns);
  const at::ScalarType dtype = compute_dtype(weight.scalar_type());
  const auto bytes = weight.options().dtype(at::kChar).memory_format(at::MemoryFormat::Contiguous);
  Grid grid{.range = code_range(bits, symmetric),
            .group_size = columns_per_group(group_size, columns),
            .stored = weight.scalar_type(),
            .codes = at::empty({rows, columns}, bytes),
            .scales = scales.has_value() ? scales->to(dtype).clone(at::MemoryFormat::Contiguous)
                                         : at::empty({rows, groups}, bytes.dtype(dtype)),
            .zero_points = zero_points.has_value() ? zero_points->clone(at::MemoryFormat::Contiguous)
                                                   : at::zeros({rows, groups}, bytes)};
  return grid;
}

template <typename T>
kernels::GridView<T> view(const Grid& grid) {
  return {.range = grid.range,
          .group_size = grid.group_size,
          .groups = grid.scales.size(1),
          .scales = grid.scales.mutable_data_ptr<T>(),
          .zero_points = grid.zero_points.mutable_data_ptr<int8_t>(),
          .codes = grid.codes.mutable_data_ptr<int8_t>(),
          .round_scale = round_scale_to<T>(grid.stored)};
}
template kernels::GridView<float> view(const Grid& grid);
template kernels::GridView<double> view(const Grid& grid);

void compute_scales(Grid& grid, const at::Tensor& weight) {
  dispatch_compute(weight.scalar_type(), [&]<typename T> {
    const auto grid_view = view<T>(grid);
    const T* const values = weight.const_data_ptr<T>();
    const int64_t columns = weight.size(1);
    const auto& kernel = typed_kernels<T>();
    for_row_tiles(weight.size(0), kernel.tile_rows, [&](int64_t row_begin, int64_t row_end) {
      kernel.compute_grid(grid_view, values, columns, row_begin, row_end);
    });
  });
}

}  // namespace miniquant::algorithms
