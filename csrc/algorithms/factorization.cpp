#include "algorithms/factorization.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "algorithms/dispatch.h"

namespace miniquant::algorithms {
namespace {

using kernels::kPanelColumns;
using kernels::TriangleLayout;

/// Panels per block: every later row that is read serves as many, so that large matrices are limited by arithmetic.
constexpr int64_t kBlockPanels = 4;

template <typename T>
class Factorization {
 public:
  Factorization(T* triangle, int64_t columns) : triangle_(triangle), layout_{columns} {}

  [[nodiscard]] bool run() const {
    for (int64_t end = layout_.panels(); end > 0;) {
      const int64_t begin = std::max<int64_t>(0, end - kBlockPanels);
      subtract(begin, end, row_of(end), layout_.columns);
      for (int64_t panel = end - 1; panel >= begin; --panel) {
        subtract(panel, panel + 1, row_of(panel + 1), row_of(end));
        if (!solve(panel)) {
          return false;
        }
      }
      end = begin;
    }
    return true;
  }

 private:
  /// The first row of a panel's diagonal block.
  [[nodiscard]] int64_t row_of(int64_t panel) const { return std::min(panel * kPanelColumns, layout_.columns); }

  [[nodiscard]] T* block(int64_t row, int64_t panel) const { return triangle_ + layout_.offset(row, panel); }

  /// A[rows of panels [begin, end), :] -= L[later, panels]^T L[later, :], later = rows [later_begin, later_end).
  void subtract(int64_t begin, int64_t end, int64_t later_begin, int64_t later_end) const {
    if (later_begin == later_end) {
      return;
    }
    for_triangle(end, [&](int64_t right) {
      for (int64_t later = later_begin; later < later_end; later += kernel_.terms_per_product) {
        const int64_t count = std::min(kernel_.terms_per_product, later_end - later);
        for (int64_t left = std::max(begin, right); left < end; ++left) {
          kernel_.subtract_products(block(later, left), block(later, right), count, row_of(left + 1) - row_of(left),
                                    block(row_of(left), right));
        }
      }
    });
  }

  /// A[panel, panel] = L^T L; L[panel, :] = L[panel, panel]^-T A[panel, :]
  [[nodiscard]] bool solve(int64_t panel) const {
    const int64_t row = row_of(panel);
    const int64_t rows = row_of(panel + 1) - row;
    T* const diagonal = block(row, panel);
    if (kernel_.factor_block(diagonal, rows) >= 0) {
      return false;
    }
    at::parallel_for(0, panel, 1, [&](int64_t begin, int64_t end) {
      for (int64_t earlier = begin; earlier < end; ++earlier) {
        kernel_.solve_block(diagonal, rows, block(row, earlier));
      }
    });
    return true;
  }

  const kernels::TypedKernels<T>& kernel_ = typed_kernels<T>();
  T* triangle_;
  TriangleLayout layout_;
};

}  // namespace

bool factor_from_last_row(const at::Tensor& triangle, int64_t columns) {
  TORCH_INTERNAL_ASSERT(triangle.numel() == TriangleLayout{columns}.size());
  bool factored = false;
  dispatch_compute(triangle.scalar_type(),
                   [&]<typename T> { factored = Factorization<T>(triangle.mutable_data_ptr<T>(), columns).run(); });
  return factored;
}

}  // namespace miniquant::algorithms
