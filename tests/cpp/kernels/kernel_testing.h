#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/triangle.h"

// Shared by the tests of the kernels. Oracles are plain scalar loops in float64 (long double for float64 kernels).

namespace miniquant::kernels::testing {

inline constexpr CodeRange kSymmetric4 = {-7, 7, true};
inline constexpr CodeRange kAsymmetric4 = {-8, 7, false};

/// Memory that ends at an unreadable page. The kernels have no sanitizer, so this page catches reads and writes past
/// the end. The destructor checks the bytes before the memory.
template <typename T>
class GuardedBuffer {
 public:
  /// `alignment` above alignof(T) is for workspaces, whose sizes the kernels round up.
  explicit GuardedBuffer(std::int64_t count, std::size_t alignment = alignof(T)) : count_(count) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + alignment - 1) / alignment * alignment;
    const std::size_t pages = (bytes + page - 1) / page + 1;
    mapped_ = (pages + 1) * page;
    void* const memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + pages * page, page, PROT_NONE) != 0) {
      throw std::bad_alloc();
    }
    base_ = static_cast<unsigned char*>(memory);
    slack_ = pages * page - bytes;
    std::memset(base_, kCanary, slack_);
    data_ = reinterpret_cast<T*>(base_ + slack_);
  }
  explicit GuardedBuffer(const std::vector<T>& values) : GuardedBuffer(static_cast<std::int64_t>(values.size())) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      data_[i] = values[i];
    }
  }
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;
  ~GuardedBuffer() {
    std::size_t changed = 0;
    for (std::size_t i = 0; i < slack_; ++i) {
      changed += base_[i] != kCanary ? 1 : 0;
    }
    EXPECT_EQ(changed, 0U) << "bytes written in front of a buffer";
    munmap(base_, mapped_);
  }

  [[nodiscard]] T* data() { return data_; }
  [[nodiscard]] const T* data() const { return data_; }
  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }
  [[nodiscard]] std::vector<T> values() const { return std::vector<T>(data_, data_ + count_); }

 private:
  static constexpr unsigned char kCanary = 0xA5;
  std::int64_t count_;
  std::size_t mapped_;
  std::size_t slack_;
  unsigned char* base_;
  T* data_;
};

inline std::vector<InstructionSet> supported_instruction_sets() {
  std::vector<InstructionSet> supported;
  for (const InstructionSet candidate : kInstructionSets) {
    if (is_supported(candidate)) {
      supported.push_back(candidate);
    }
  }
  return supported;
}

/// The supported instruction sets that fuse multiply-adds: all but the baseline. They do the same arithmetic on every
/// element, whatever the length of their vectors. A test that compares them reports that it is skipped if there are not
/// two.
inline std::vector<InstructionSet> fused_instruction_sets() {
  std::vector<InstructionSet> fused = supported_instruction_sets();
  std::erase(fused, InstructionSet::kBaseline);
  return fused;
}

constexpr const char* kNeedsTwoFused = "needs a CPU with two instruction sets that fuse multiply-adds";

/// Calls body(table) for every instruction set that this CPU supports; the trace of a failure names it.
template <typename Body>
void for_each_table(const Body& body) {
  for (const InstructionSet instruction_set : supported_instruction_sets()) {
    SCOPED_TRACE(name(instruction_set));
    body(kernels_for(instruction_set));
  }
}

/// The same with the kernels for T.
template <typename T, typename Body>
void for_each_instruction_set(const Body& body) {
  for_each_table([&](const KernelTable& table) { body(typed_kernels<T>(table)); });
}

/// The type in which the oracle of a kernel for T sums.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, float>, double, long double>;

template <typename T>
constexpr Wide<T> kEps = static_cast<Wide<T>>(std::numeric_limits<T>::epsilon());

template <typename T>
T no_rounding(T scale, std::int32_t /*levels*/) {
  return scale;
}

/// Standard normal values times `factor`.
template <typename T>
std::vector<T> normal(std::mt19937_64& generator, std::int64_t count, double factor = 1.0) {
  std::normal_distribution<double> distribution(0.0, factor);
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) {
    value = static_cast<T>(distribution(generator));
  }
  return values;
}

/// The panels of a triangle (triangle.h) with entry(row, column) in the lower triangle [K, K] and `rest` elsewhere.
template <typename T, typename Entry>
std::vector<T> panels_of(std::int64_t columns, const Entry& entry, T rest) {
  const TriangleLayout layout{columns};
  std::vector<T> panels(static_cast<std::size_t>(layout.size()), rest);
  for (std::int64_t row = 0; row < columns; ++row) {
    for (std::int64_t column = 0; column <= row; ++column) {
      const std::int64_t at = layout.offset(row, column / kPanelColumns) + column % kPanelColumns;
      panels[static_cast<std::size_t>(at)] = static_cast<T>(entry(row, column));
    }
  }
  return panels;
}

using ElementTypes = ::testing::Types<float, double>;

struct ElementTypeNames {
  template <typename T>
  static const char* GetName(int) {
    return std::is_same_v<T, float> ? "float32" : "float64";
  }
};

}  // namespace miniquant::kernels::testing
