#include "algorithms/rtn.h"

#include <cstdint>
#include <optional>

#include "algorithms/dispatch.h"
#include "algorithms/grid.h"

namespace miniquant::algorithms {

QuantizedWeight rtn(const at::Tensor& weight, const GridOptions& options) {
  // Only a search for scales computes squares.
  const ScaledWeight scaled = options.scale_method == ScaleMethod::kAbsmax
                                  ? ScaledWeight{weight.to(compute_dtype(weight.scalar_type())).contiguous(), {}, {}}
                                  : scaled_weight(weight, options.scales);
  const at::Tensor& values = scaled.values;
  Grid grid = make_grid(weight, options, scaled.units);
  dispatch_compute(values.scalar_type(), [&]<typename T> {
    const auto grid_view = view<T>(grid);
    const T* const from = values.const_data_ptr<T>();
    const int64_t columns = values.size(1);
    std::optional<ScalesOfRows<T>> scales;
    if (!options.scales.has_value()) {
      scales.emplace(grid, values, options.scale_method, at::Tensor());
    }
    const auto& kernel = typed_kernels<T>();
    const int64_t operations = 8 * columns + (scales ? scales->operations() : 0);
    for_row_tiles(values.size(0), kernel.tile_rows, operations, [&](int64_t row_begin, int64_t row_end) {
      if (scales) {
        scales->set(row_begin, row_end);
      }
      kernel.round_to_nearest(grid_view, from, columns, row_begin, row_end);
    });
  });
  const QuantizationGrid& kind = options;
  return {kind, grid.codes, grid.stored_scales(), grid.zero_points};
}

}  // namespace miniquant::algorithms
