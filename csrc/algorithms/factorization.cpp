#include "algorithms/factorization.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "algorithms/dispatch.h"
#include "algorithms/parallel.h"

namespace miniquant::algorithms {
namespace {

using kernels::kPanelColumns;
using kernels::TriangleLayout;

/// Panels per block. A later row that is read is used for all of them, so arithmetic, not memory, limits large
/// matrices.
constexpr int64_t kBlockPanels = 4;

/// How far the factorization of one panel of columns is; threads read it of one another. On a cache line of its own.
struct alignas(64) PanelProgress {
  std::atomic<bool> set;             ///< whether the rows of its diagonal block hold A
  std::atomic<int64_t> solved_from;  ///< rows of panels from this one on hold L
  std::atomic<int64_t> later_done;   ///< rows of panels from this one on: products of later blocks are subtracted
};

/// The steps of the factorization, in an order in which each step needs only earlier ones. Threads take them in that
/// order and wait for what they need, so one parallel region is enough.
///
///   for each panel, from the last:         A[panel, all]    is set, where it is not yet
///   for each block of panels [begin, end), from the last
///     for each panel `right` < end:        A[block, right]  -= L[after block, block]^T L[after block, right]
///     for each panel of the block, from the last, for each `right` <= panel
///                                          A[panel, right]  -= L[rest of block, panel]^T L[rest of block, right]
///       right = panel:                     A[panel, panel]   = L^T L
///       right < panel:                     L[panel, right]   = L[panel, panel]^-T A[panel, right]
template <typename T>
class Factorization {
 public:
  Factorization(T* triangle, int64_t columns, const std::function<void(int64_t panel)>& set_rows)
      : triangle_(triangle), layout_{columns}, set_rows_(set_rows), progress_(static_cast<size_t>(layout_.panels())) {
    for (PanelProgress& panel : progress_) {
      panel.set.store(!set_rows_, std::memory_order_relaxed);
      panel.solved_from.store(layout_.panels(), std::memory_order_relaxed);
      panel.later_done.store(layout_.panels(), std::memory_order_relaxed);
    }
    list_steps();
  }

  [[nodiscard]] bool run() {
    const int64_t columns = layout_.columns;
    Team team(team_size(layout_.panels(), columns * columns * columns / 6));
    Pieces pieces(static_cast<int64_t>(steps_.size()));
    team.run([&] {
      team.take(pieces, [&](int64_t piece) {
        const Step& step = steps_[static_cast<size_t>(piece)];
        if (!take_step(team, step)) {
          team.stop();
        }
      });
    });
    return !team.stopped();
  }

 private:
  enum class Kind { kSetRows, kSubtractLaterBlocks, kSolve };

  /// Panels [begin, end) are the block, `panel` and `right` those of the comment above.
  struct Step {
    Kind kind;
    int64_t begin;
    int64_t end;
    int64_t panel;
    int64_t right;
  };

  void list_steps() {
    for (int64_t panel = layout_.panels() - 1; set_rows_ && panel >= 0; --panel) {
      steps_.push_back({.kind = Kind::kSetRows, .begin = panel, .end = panel + 1, .panel = panel, .right = 0});
    }
    for (int64_t end = layout_.panels(); end > 0;) {
      const int64_t begin = std::max<int64_t>(0, end - kBlockPanels);
      for (int64_t right = end - 1; right >= 0; --right) {
        steps_.push_back({Kind::kSubtractLaterBlocks, begin, end, end, right});
      }
      for (int64_t panel = end - 1; panel >= begin; --panel) {
        for (int64_t right = panel; right >= 0; --right) {
          steps_.push_back({Kind::kSolve, begin, end, panel, right});
        }
      }
      end = begin;
    }
  }

  /// Returns false if a pivot is not positive or the team was stopped.
  [[nodiscard]] bool take_step(const Team& team, const Step& step) {
    switch (step.kind) {
      case Kind::kSetRows:
        set_rows_(step.panel);
        progress(step.panel).set.store(true, std::memory_order_release);
        return true;
      case Kind::kSubtractLaterBlocks:
        return subtract_later_blocks(team, step);
      case Kind::kSolve:
        return solve(team, step);
    }
    return false;
  }

  /// The first row of a panel's diagonal block.
  [[nodiscard]] int64_t row_of(int64_t panel) const { return std::min(panel * kPanelColumns, layout_.columns); }

  [[nodiscard]] T* block(int64_t row, int64_t panel) const { return triangle_ + layout_.offset(row, panel); }

  [[nodiscard]] PanelProgress& progress(int64_t panel) { return progress_[static_cast<size_t>(panel)]; }

  /// Waits until L[rows of panels from `first` on, panel] is computed.
  [[nodiscard]] bool wait_for_solved(const Team& team, int64_t panel, int64_t first) {
    return team.wait_until([&] { return progress(panel).solved_from.load(std::memory_order_acquire) <= first; });
  }

  /// A[rows of panel `left`, right] -= L[later, left]^T L[later, right], later = rows [later_begin, later_end), one
  /// call of the kernel.
  void subtract_once(int64_t left, int64_t right, int64_t later_begin, int64_t later_end,
                     const kernels::Upcoming& upcoming = {}) const {
    kernel_.subtract_products(block(later_begin, left), block(later_begin, right), later_end - later_begin,
                              row_of(left + 1) - row_of(left), block(row_of(left), right), upcoming);
  }

  /// The same for any number of rows.
  void subtract(int64_t left, int64_t right, int64_t later_begin, int64_t later_end) const {
    for (int64_t later = later_begin; later < later_end; later += kernel_.terms_per_product) {
      subtract_once(left, right, later, std::min(later_end, later + kernel_.terms_per_product));
    }
  }

  /// Rows [begin, end) of a panel.
  [[nodiscard]] kernels::Upcoming::Range rows_of(int64_t panel, int64_t begin, int64_t end) const {
    return {block(begin, panel), (end - begin) * kPanelColumns * static_cast<int64_t>(sizeof(T))};
  }

  /// Subtracts the products of later blocks from the rows of a block in one panel. Returns false if the team was
  /// stopped.
  [[nodiscard]] bool subtract_later_blocks(const Team& team, const Step& step) {
    const int64_t first = std::max(step.begin, step.right);
    for (int64_t panel = first; panel < step.end; ++panel) {
      if (!team.wait_until([&] { return progress(panel).set.load(std::memory_order_acquire); }) ||
          !wait_for_solved(team, panel, step.end)) {
        return false;
      }
    }
    if (!wait_for_solved(team, step.right, step.end)) {
      return false;
    }
    for (int64_t later = row_of(step.end); later < layout_.columns; later += kernel_.terms_per_product) {
      const int64_t later_end = std::min(layout_.columns, later + kernel_.terms_per_product);
      const int64_t next_end = std::min(layout_.columns, later_end + kernel_.terms_per_product);
      for (int64_t left = first; left < step.end; ++left) {
        const kernels::Upcoming upcoming =
            left + 1 < step.end
                ? kernels::Upcoming{{rows_of(left + 1, later, later_end)}}
                : kernels::Upcoming{{rows_of(first, later_end, next_end), rows_of(step.right, later_end, next_end)}};
        subtract_once(left, step.right, later, later_end, upcoming);
      }
    }
    progress(step.right).later_done.store(step.begin, std::memory_order_release);
    return true;
  }

  /// Computes L in the rows of one panel and the columns of another. Returns false if a pivot is not positive or the
  /// team was stopped.
  [[nodiscard]] bool solve(const Team& team, const Step& step) {
    const int64_t row = row_of(step.panel);
    const int64_t rows = row_of(step.panel + 1) - row;
    if (!team.wait_until(
            [&] { return progress(step.right).later_done.load(std::memory_order_acquire) <= step.begin; }) ||
        !wait_for_solved(team, step.right, step.panel + 1) || !wait_for_solved(team, step.panel, step.panel + 1)) {
      return false;
    }
    subtract(step.panel, step.right, row + rows, row_of(step.end));
    if (step.right == step.panel) {
      if (kernel_.factor_block(block(row, step.panel), rows) >= 0) {
        return false;
      }
    } else {
      if (!wait_for_solved(team, step.panel, step.panel)) {
        return false;
      }
      kernel_.solve_block(block(row, step.panel), rows, block(row, step.right));
    }
    progress(step.right).solved_from.store(step.panel, std::memory_order_release);
    return true;
  }

  const kernels::TypedKernels<T>& kernel_ = typed_kernels<T>();
  T* triangle_;
  TriangleLayout layout_;
  const std::function<void(int64_t panel)>& set_rows_;
  std::vector<PanelProgress> progress_;
  std::vector<Step> steps_;
};

}  // namespace

bool factor_from_last_row(const at::Tensor& triangle, int64_t columns,
                          const std::function<void(int64_t panel)>& set_rows) {
  TORCH_INTERNAL_ASSERT(triangle.numel() == TriangleLayout{columns}.size());
  bool factored = false;
  dispatch_compute(triangle.scalar_type(), [&]<typename T> {
    factored = Factorization<T>(triangle.mutable_data_ptr<T>(), columns, set_rows).run();
  });
  return factored;
}

}  // namespace miniquant::algorithms
