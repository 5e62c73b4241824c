#include "algorithms/refine.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>

#include <cstdint>

#include "algorithms/damping.h"
#include "algorithms/dispatch.h"
#include "algorithms/symmetric.h"

namespace miniquant::algorithms {

void refine(const at::Tensor& weight, const at::Tensor& hessian, double ridge, int64_t rounds, Grid& grid,
            at::Tensor& row_loss) {
  const at::Tensor triangle = lower_triangle(hessian, weight.scalar_type());
  set_diagonal_of_triangle(triangle,
                           diagonal_of_triangle(triangle, weight.size(1)) + added_to_diagonal(hessian, ridge));
  dispatch_compute(weight.scalar_type(), [&]<typename T> {
    const kernels::RefineProblem<T> problem{.columns = weight.size(1),
                                            .weight = weight.const_data_ptr<T>(),
                                            .grid = view<T>(grid),
                                            .triangle = triangle.const_data_ptr<T>(),
                                            .rounds = rounds,
                                            .row_loss = row_loss.mutable_data_ptr<T>()};
    const auto& kernel = typed_kernels<T>();
    for_row_tiles(weight.size(0), kernel.tile_rows, [&](int64_t row_begin, int64_t row_end) {
      const at::Tensor workspace = at::empty({kernel.refine_workspace(problem, row_end - row_begin)}, weight.options());
      kernel.refine(problem, row_begin, row_end, workspace.mutable_data_ptr<T>());
    });
  });
}

}  // namespace miniquant::algorithms
