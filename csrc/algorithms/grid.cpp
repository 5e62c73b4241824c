#include "algorithms/grid.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "algorithms/dispatch.h"

namespace miniquant::algorithms {
namespace {

/// `scale` as dtype Stored holds it; to the 16-bit dtypes through float32, as ATen converts.
template <typename T, typename Stored>
T round_scale(T scale) {
  static const T smallest = static_cast<T>(smallest_scale(c10::CppTypeToScalarType<Stored>::value));
  using Through = std::conditional_t<sizeof(Stored) == 2, float, Stored>;
  return std::max(static_cast<T>(static_cast<Stored>(static_cast<Through>(scale))), smallest);
}

template <typename T>
kernels::RoundScale<T> round_scale_to(at::ScalarType stored) {
  switch (stored) {
    case at::kBFloat16:
      return round_scale<T, c10::BFloat16>;
    case at::kHalf:
      return round_scale<T, c10::Half>;
    case at::kFloat:
      return round_scale<T, float>;
    default:
      return round_scale<T, T>;
  }
}

}  // namespace

at::ScalarType compute_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

kernels::CodeRange code_range(int64_t bits, bool symmetric, bool full_range) {
  const auto half = static_cast<int32_t>(1U << static_cast<unsigned>(bits - 1));
  return {symmetric && !full_range ? 1 - half : -half, half - 1, symmetric};
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

Grid make_grid(const at::Tensor& weight, const GridOptions& options) {
  const std::optional<at::Tensor>& scales = options.scales;
  const std::optional<at::Tensor>& zero_points = options.zero_points;
  const int64_t rows = weight.size(0);
  const int64_t columns = weight.size(1);
  const int64_t groups = groups_per_row(options.group_size, columns);
  const at::ScalarType dtype = compute_dtype(weight.scalar_type());
  const auto bytes = weight.options().dtype(at::kChar).memory_format(at::MemoryFormat::Contiguous);
  Grid grid{.range = code_range(options.bits, options.symmetric, options.full_range),
            .group_size = columns_per_group(options.group_size, columns),
            .stored = options.scale_dtype.value_or(weight.scalar_type()),
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

template <typename T>
std::vector<T> scale_factors(const kernels::CodeRange& range, ScaleMethod method) {
  std::vector<T> factors = {T(1)};
  if (method != ScaleMethod::kAbsmax) {
    // From half the range to a little more than all of it, in steps of 1/40; the likelier first.
    for (int step = -1; step >= -20; --step) {
      factors.push_back(T(1) + static_cast<T>(step) / 40);
    }
    for (int step = 1; step <= 4; ++step) {
      factors.push_back(T(1) + static_cast<T>(step) / 40);
    }
    // In a sweep the other sign pays where the level that it moves is one of few.
    const bool few_levels = range.code_max < 7;
    if (range.symmetric && -range.code_min > range.code_max && (method != ScaleMethod::kLoss || few_levels)) {
      const size_t count = factors.size();
      for (size_t i = 0; i < count; ++i) {
        factors.push_back(-factors[i]);
      }
    }
  }
  return factors;
}
template std::vector<float> scale_factors(const kernels::CodeRange& range, ScaleMethod method);
template std::vector<double> scale_factors(const kernels::CodeRange& range, ScaleMethod method);

void compute_scales(Grid& grid, const at::Tensor& weight, ScaleMethod method, const at::Tensor& hessian) {
  TORCH_INTERNAL_ASSERT(method != ScaleMethod::kLoss);
  dispatch_compute(weight.scalar_type(), [&]<typename T> {
    const auto grid_view = view<T>(grid);
    const T* const values = weight.const_data_ptr<T>();
    const int64_t columns = weight.size(1);
    const at::Tensor importance = method == ScaleMethod::kHessian
                                      ? hessian.diagonal().to(weight.scalar_type()).contiguous()
                                      : at::ones({columns}, weight.options());
    const std::vector<T> factors = scale_factors<T>(grid.range, method);
    const kernels::ScaleSearch<T> search{factors.data(), static_cast<int64_t>(factors.size()),
                                         importance.template const_data_ptr<T>()};
    const auto& kernel = typed_kernels<T>();
    const int64_t operations = columns * static_cast<int64_t>(factors.size());
    for_row_tiles(weight.size(0), kernel.tile_rows, operations, [&](int64_t row_begin, int64_t row_end) {
      if (method == ScaleMethod::kAbsmax) {
        kernel.compute_grid(grid_view, values, columns, row_begin, row_end);
      } else {
        kernel.search_grid(grid_view, search, values, columns, row_begin, row_end);
      }
    });
  });
}

}  // namespace miniquant::algorithms
