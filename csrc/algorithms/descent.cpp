#include "algorithms/descent.h"

#include <ATen/ops/empty.h>

#include <cstdint>

#include "algorithms/damping.h"
#include "algorithms/dispatch.h"
#include "algorithms/symmetric.h"

namespace miniquant::algorithms {
namespace {

/// More take time, a little for each, and change the loss by less than a ten-thousandth.
constexpr int64_t kMostRounds = 8;

}  // namespace

at::Tensor room_for_gradient(const at::Tensor& weight) {
  return at::empty({weight.size(0), kernels::SymmetricLayout{weight.size(1)}.padded_columns()}, weight.options());
}

void descend(const at::Tensor& hessian, double ridge, Grid& grid, at::Tensor& gradient, at::Tensor& row_loss) {
  const at::Tensor panels = damped_panels(hessian, added_to_diagonal(hessian, ridge), gradient.scalar_type());
  dispatch_compute(gradient.scalar_type(), [&]<typename T> {
    const kernels::DescentProblem<T> problem{.columns = hessian.size(0),
                                             .grid = view<T>(grid),
                                             .hessian = panels.const_data_ptr<T>(),
                                             .rounds = kMostRounds,
                                             .gradient = gradient.mutable_data_ptr<T>(),
                                             .row_loss = row_loss.mutable_data_ptr<T>()};
    const auto& kernel = typed_kernels<T>();
    for_row_tiles(gradient.size(0), kernel.tile_rows, [&](int64_t row_begin, int64_t row_end) {
      const at::Tensor workspace =
          at::empty({kernel.descent_workspace(problem, row_end - row_begin)}, gradient.options());
      kernel.descend(problem, row_begin, row_end, workspace.mutable_data_ptr<T>());
    });
  });
}

}  // namespace miniquant::algorithms
