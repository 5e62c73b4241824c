#include "algorithms/refine.h"

#include <ATen/ops/empty.h>

#include <cstdint>

#include "algorithms/damping.h"
#include "algorithms/dispatch.h"
#include "algorithms/symmetric.h"

namespace miniquant::algorithms {
namespace {

/// Passes over the codes within the first round: what a fourth finds, and more, further rounds find as well.
constexpr int64_t kMostPasses = 3;

/// kernel(problem, row_begin, row_end, workspace) over all rows, in parallel.
template <typename T, typename Problem>
void for_rows(const at::Tensor& gradient, const Problem& problem,
              int64_t (*workspace_of)(const Problem& problem, int64_t rows),
              void (*kernel)(const Problem& problem, int64_t row_begin, int64_t row_end, T* workspace)) {
  for_row_tiles(gradient.size(0), typed_kernels<T>().tile_rows, [&](int64_t row_begin, int64_t row_end) {
    const at::Tensor workspace = at::empty({workspace_of(problem, row_end - row_begin)}, gradient.options());
    kernel(problem, row_begin, row_end, workspace.mutable_data_ptr<T>());
  });
}

}  // namespace

at::Tensor room_for_gradient(const at::Tensor& weight) {
  return at::empty({weight.size(0), kernels::SymmetricLayout{weight.size(1)}.padded_columns()}, weight.options());
}

void refine(const at::Tensor& hessian, double ridge, int64_t rounds, Grid& grid, at::Tensor& gradient,
            at::Tensor& row_loss) {
  const at::Tensor panels = damped_panels(hessian, added_to_diagonal(hessian, ridge), gradient.scalar_type());
  dispatch_compute(gradient.scalar_type(), [&]<typename T> {
    kernels::RefineProblem<T> problem{.columns = hessian.size(0),
                                      .grid = view<T>(grid),
                                      .hessian = panels.const_data_ptr<T>(),
                                      .gradient = gradient.mutable_data_ptr<T>(),
                                      .rounds = kMostPasses,
                                      .row_loss = row_loss.mutable_data_ptr<T>()};
    const auto& kernel = typed_kernels<T>();
    for_rows<T>(gradient, problem, kernel.descent_workspace, kernel.descend);
    if (rounds > 1) {
      problem.rounds = rounds - 1;
      for_rows<T>(gradient, problem, kernel.refine_workspace, kernel.refine);
    }
  });
}

}  // namespace miniquant::algorithms
