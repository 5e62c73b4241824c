#include "algorithms/parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>

namespace miniquant::algorithms {

int64_t team_size(int64_t pieces, int64_t operations) {
  if (operations < kSerialOperations || at::in_parallel_region()) {
    return 1;
  }
  return std::clamp<int64_t>(pieces, 1, at::get_num_threads());
}

void Team::run(const std::function<void()>& member) {
  if (size_ == 1) {
    member();
    return;
  }
  std::atomic<int64_t> ended = 0;
  at::parallel_for(0, size_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      try {
        member();
      } catch (...) {
        stop();
        throw;  // parallel_for() rethrows it in its caller
      }
      ended.fetch_add(1, std::memory_order_release);
    }
    // At the end of its region OpenMP waits without yielding the processor, and may so keep the thread it waits for
    // from running. So members wait here first, for a limited time, because parallel_for() does not promise that each
    // has a thread.
    constexpr int64_t kMostTurns = 10'000;
    for (int64_t turn = 0; turn < kMostTurns && ended.load(std::memory_order_acquire) < size_ && !stopped(); ++turn) {
      pause(turn);
    }
  });
}

}  // namespace miniquant::algorithms
