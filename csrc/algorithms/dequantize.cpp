#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/repeat_interleave.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>

#include "algorithms/dispatch.h"
#include "algorithms/grid.h"
#include "algorithms/parallel.h"
#include "algorithms/rtn.h"

namespace miniquant::algorithms {
namespace {

/// The dtype in which codes are multiplied with scales.
at::ScalarType multiplied_in(at::ScalarType scales, at::ScalarType result) {
  return c10::promoteTypes(compute_dtype(scales), compute_dtype(result));
}

/// [N, groups] -> [N, K]: each column gets its group's value.
at::Tensor per_column(const at::Tensor& per_group, int64_t group_columns, int64_t columns) {
  return at::repeat_interleave(per_group, group_columns, /*dim=*/1).narrow(1, 0, columns);
}

/// kernel(codes, row_begin, row_end) over all rows, in parallel.
template <typename T, typename Kernel>
void dequantize_rows(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                     int64_t group_columns, const Kernel& kernel) {
  const kernels::CodesView<T> view{.columns = codes.size(1),
                                   .group_size = group_columns,
                                   .groups = scales.size(1),
                                   .codes = codes.const_data_ptr<int8_t>(),
                                   .scales = scales.const_data_ptr<T>(),
                                   .zero_points = zero_points.const_data_ptr<int8_t>()};
  for_row_tiles(codes.size(0), 1, kOperationsPerEntryRead * view.columns,
                [&](int64_t row_begin, int64_t row_end) { kernel(view, row_begin, row_end); });
}

at::Tensor dequantize_on_cpu(const at::Tensor& given_codes, const at::Tensor& given_scales,
                             const at::Tensor& given_zero_points, int64_t group_columns, at::ScalarType result) {
  const at::ScalarType multiplied = multiplied_in(given_scales.scalar_type(), result);
  const at::Tensor codes = given_codes.contiguous();
  const at::Tensor scales = given_scales.to(multiplied).contiguous();
  const at::Tensor zero_points = given_zero_points.contiguous();
  if (multiplied == at::kFloat && result == at::kBFloat16) {
    at::Tensor values = at::empty(codes.sizes(), codes.options().dtype(result));
    auto* const to = reinterpret_cast<uint16_t*>(values.mutable_data_ptr<c10::BFloat16>());
    dequantize_rows<float>(codes, scales, zero_points, group_columns,
                           [&](const auto& view, int64_t row_begin, int64_t row_end) {
                             kernels::kernels().dequantize_to_bf16(view, row_begin, row_end, to);
                           });
    return values;
  }
  const at::Tensor values = at::empty(codes.sizes(), codes.options().dtype(multiplied));
  dispatch_compute(multiplied, [&]<typename T> {
    T* const to = values.mutable_data_ptr<T>();
    dequantize_rows<T>(codes, scales, zero_points, group_columns,
                       [&](const auto& view, int64_t row_begin, int64_t row_end) {
                         typed_kernels<T>().dequantize(view, row_begin, row_end, to);
                       });
  });
  return values.to(result);
}

}  // namespace

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                      int64_t group_size, std::optional<at::ScalarType> dtype) {
  if (!codes.is_cpu()) {
    return dequantize_by_operations(codes, scales, zero_points, group_size, dtype);
  }
  return dequantize_on_cpu(codes, scales, zero_points, columns_per_group(group_size, codes.size(1)),
                           dtype.value_or(scales.scalar_type()));
}

at::Tensor dequantize_by_operations(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zero_points,
                                    int64_t group_size, std::optional<at::ScalarType> dtype) {
  const int64_t columns = codes.size(1);
  const int64_t group_columns = columns_per_group(group_size, columns);
  const at::ScalarType result = dtype.value_or(scales.scalar_type());
  const at::ScalarType multiplied = multiplied_in(scales.scalar_type(), result);
  const at::Tensor levels = codes.to(multiplied) - per_column(zero_points.to(multiplied), group_columns, columns);
  return (levels * per_column(scales.to(multiplied), group_columns, columns)).to(result);
}

}  // namespace miniquant::algorithms
