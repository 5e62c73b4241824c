#pragma once

#include <cstdint>

#include "kernels/kernels.h"
#include "kernels/target-inl.h"

// Memory that later products read, brought into the second-level cache while one runs: a cache line with each term. A
// CPU does not foresee that the products go on in another tile, panel or row. A fetch changes no result, and one of
// memory that does not exist does nothing.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

constexpr std::int64_t kCacheLineBytes = 64;

MINIQUANT_INLINE void fetch_line(const void* line) {
  constexpr int kToRead = 0;
  constexpr int kToSecondLevel = 2;
  __builtin_prefetch(line, kToRead, kToSecondLevel);
}

/// Fetches `width` elements of each row [begin, end) of a matrix.
template <typename T>
MINIQUANT_INLINE void fetch_rows(const T* matrix, std::int64_t ld, std::int64_t begin, std::int64_t end,
                                 std::int64_t width) {
  const std::int64_t bytes = width * static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t row = begin; row < end; ++row) {
    const char* const first = reinterpret_cast<const char*>(matrix + row * ld);
    for (std::int64_t byte = 0; byte < bytes; byte += kCacheLineBytes) {
      fetch_line(first + byte);
    }
    fetch_line(first + bytes - 1);
  }
}

/// For products whose data are in the first caches already.
struct FetchNothing {
  static MINIQUANT_INLINE void with_panel(const void* /*coefficients*/) {}
  static MINIQUANT_INLINE void with_term() {}
};

/// One range of memory, or one line again and again.
struct FetchLines {
  const char* line;
  std::int64_t step;

  static MINIQUANT_INLINE void with_panel(const void* /*coefficients*/) {}
  MINIQUANT_INLINE void with_term() {
    fetch_line(line);
    line += step;
  }
};

/// In each panel that a product reads, the rows that follow those of its coefficients: `bytes` later.
struct FetchLaterRows {
  std::int64_t bytes;
  const char* line = nullptr;

  MINIQUANT_INLINE void with_panel(const void* coefficients) { line = static_cast<const char*>(coefficients) + bytes; }
  MINIQUANT_INLINE void with_term() {
    fetch_line(line);
    line += kCacheLineBytes;
  }
};

/// A line to fetch again and again where there is nothing else.
constexpr char kNothingToFetch = 0;

/// Hands out the lines of what is to be fetched.
class Fetcher {
 public:
  explicit MINIQUANT_INLINE Fetcher(const Upcoming& upcoming) : upcoming_(upcoming) {}

  /// The lines for a product of so many terms.
  MINIQUANT_INLINE FetchLines take(std::int64_t terms) {
    while (now_ + 1 < kUpcomingRanges && upcoming_.ranges[now_].bytes <= 0) {
      ++now_;
    }
    Upcoming::Range& range = upcoming_.ranges[now_];
    if (range.bytes <= 0) {
      return {&kNothingToFetch, 0};
    }
    const auto* const line = static_cast<const char*>(range.begin);
    range.begin = line + terms * kCacheLineBytes;
    range.bytes -= terms * kCacheLineBytes;
    return {line, kCacheLineBytes};
  }

 private:
  Upcoming upcoming_;
  std::int64_t now_ = 0;
};

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
