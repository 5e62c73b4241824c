#include "algorithms/column_order.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "algorithms/grid.h"
#include "algorithms/parallel.h"
#include "kernels/arithmetic.h"

namespace miniquant::algorithms {
namespace {

/// Max columns of a group to reorder by variance, which takes the cube of their number. Longer groups keep the order of
/// their diagonal.
constexpr int64_t kMostColumnsToOrder = 512;

/// Orders the columns of a group, last place first: the column of least H_jj, then each time the column of least
/// variance given those already placed. The loss weights a column's rounding error by the variance that is left of the
/// column when it is quantized; this order evens out these variances. `group` [G, G] is overwritten.
std::vector<int64_t> order_within_group(at::TensorAccessor<double, 2> group) {
  const int64_t columns = group.size(0);
  std::vector<int64_t> place(columns);
  std::iota(place.begin(), place.end(), 0);
  for (int64_t last = columns - 1; last > 0; --last) {
    // Ties go to the last, so columns without inputs keep their order.
    const auto least = std::min_element(place.rbegin() + (columns - 1 - last), place.rend(),
                                        [&](int64_t a, int64_t b) { return group[a][a] < group[b][b]; });
    std::rotate(least.base() - 1, least.base(), place.begin() + last + 1);
    const int64_t taken = place[last];
    const double variance = group[taken][taken];
    for (int64_t a = 0; variance > 0 && a < last; ++a) {
      const double share = group[place[a]][taken] / variance;
      for (int64_t b = 0; b < last; ++b) {
        group[place[a]][place[b]] -= share * group[place[b]][taken];
      }
    }
  }
  return place;
}

/// The columns in stored order of groups, each group ordered by order_within_group().
at::Tensor order_within_groups(const at::Tensor& hessian, int64_t group_columns) {
  const int64_t columns = hessian.size(0);
  const at::Tensor order = at::empty({columns}, hessian.options().dtype(at::kLong));
  int64_t* const to = order.mutable_data_ptr<int64_t>();
  const int64_t operations = columns * group_columns * group_columns / 3;
  for_pieces(kernels::ceil_div(columns, group_columns), operations, [&](int64_t piece) {
    const int64_t begin = piece * group_columns;
    const int64_t count = std::min(group_columns, columns - begin);
    const at::Tensor group = hessian.narrow(0, begin, count).narrow(1, begin, count).to(at::kDouble, false, true);
    const std::vector<int64_t> place = order_within_group(group.accessor<double, 2>());
    std::ranges::transform(place, to + begin, [&](int64_t column) { return begin + column; });
  });
  return order;
}

}  // namespace

at::Tensor order_of_columns(const at::Tensor& hessian, ColumnOrder order, int64_t group_size) {
  const int64_t columns = hessian.size(0);
  if (order == ColumnOrder::kNatural) {
    return at::arange(columns, hessian.options().dtype(at::kLong));
  }
  at::Tensor by_diagonal = hessian.diagonal().argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
  if (order == ColumnOrder::kActivation || columns == 0) {
    return by_diagonal;
  }
  const int64_t group_columns = columns_per_group(group_size, columns);
  std::vector<at::Tensor> means;
  for (const at::Tensor& group : hessian.diagonal().to(at::kDouble).split(group_columns)) {
    means.push_back(group.mean());
  }
  if (columns % group_columns != 0) {
    // A shorter last group comes last, so every group of the sweep begins at a multiple of the group size.
    means.back() = at::full_like(means.back(), -std::numeric_limits<double>::infinity());
  }
  const at::Tensor place_of_group = at::stack(means).argsort(true, 0, /*descending=*/true).argsort();
  const at::Tensor within =
      group_columns > kMostColumnsToOrder ? by_diagonal : order_within_groups(hessian, group_columns);
  const at::Tensor place = place_of_group.index_select(0, within.div(group_columns, "floor"));
  return within.index_select(0, place.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false));
}

}  // namespace miniquant::algorithms
