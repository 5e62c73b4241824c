#include <ATen/TensorOperators.h>
#include <ATen/ops/repeat_interleave.h>

#include "algorithms/grid.h"
#include "algorithms/rtn.h"

namespace miniquant::algorithms {
namespace {

/// [N, groups] -> [N, K]: each column gets its group's value.
at::Tensor per_column(const at::Tensor& per_group, int64_t group_columns, int64_t columns) {
  return at::repeat_interleave(per_group, group_columns, /*dim=*/1).narrow(1, 0, columns);
}

}  // namespace

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                      int64_t group_size, std::optional<at::ScalarType> dtype) {
  const int64_t columns = codes.size(1);
  const int64_t group_columns = columns_per_group(group_size, columns);
  const at::ScalarType result = dtype.value_or(scales.scalar_type());
  const at::ScalarType compute = c10::promoteTypes(compute_dtype(scales.scalar_type()), compute_dtype(result));
  const at::Tensor levels = codes.to(compute) - per_column(zero_points.to(compute), group_columns, columns);
  return (levels * per_column(scales.to(compute), group_columns, columns)).to(result);
}

}  // namespace miniquant::algorithms
