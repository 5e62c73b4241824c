#include "algorithms/refine.h"

#include <cstdint>

#include "algorithms/dispatch.h"
#include "algorithms/large_pages.h"

namespace miniquant::algorithms {
namespace {

/// Max passes over the codes in the first round. The next round finds what a fourth pass would.
constexpr int64_t kMostPasses = 3;

/// Tiles in a piece of the descent, which brings every panel of H into the second-level cache once for all rows of a
/// piece.
constexpr int64_t kDescentTiles = 16;

}  // namespace

at::Tensor room_for_gradient(const at::Tensor& weight) {
  const int64_t columns = kernels::SymmetricLayout{weight.size(1)}.padded_columns();
  return empty_in_large_pages({weight.size(0), columns}, weight.scalar_type());
}

void refine(const at::Tensor& hessian, const Damping& damping, int64_t rounds, Grid& grid, at::Tensor& gradient,
            at::Tensor& row_loss) {
  const at::Tensor panels = damped_panels(hessian, damping, gradient.scalar_type());
  dispatch_compute(gradient.scalar_type(), [&]<typename T> {
    const int64_t columns = hessian.size(0);
    kernels::RefineProblem<T> problem{.columns = columns,
                                      .grid = view<T>(grid),
                                      .hessian = panels.const_data_ptr<T>(),
                                      .gradient = gradient.mutable_data_ptr<T>(),
                                      .rounds = kMostPasses,
                                      .row_loss = row_loss.mutable_data_ptr<T>()};
    const auto& kernel = typed_kernels<T>();
    const int64_t operations = columns * columns / 2;
    run_on_rows<T>(gradient.size(0), operations, problem, kernel.descent_workspace, kernel.descend, kDescentTiles);
    if (rounds > 1) {
      problem.rounds = rounds - 1;
      run_on_rows<T>(gradient.size(0), operations, problem, kernel.refine_workspace, kernel.refine);
    }
  });
}

}  // namespace miniquant::algorithms
