#pragma once

#include <cstdint>

#include "kernels/arithmetic.h"
#include "kernels/short_vector-inl.h"
#include "kernels/target-inl.h"
#include "kernels/triangle.h"

// Transposed copies of matrices, a small block at a time.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// Rows and columns that one step of a transposition holds in registers.
template <typename T>
constexpr std::int64_t kBlock = 16 / static_cast<std::int64_t>(sizeof(T));
static_assert(kPanelColumns % kBlock<float> == 0 && kPanelColumns % kBlock<double> == 0);

/// to[j][i] = from[i][j] of one block. Overloads, because shuffles take literal indices.
MINIQUANT_INLINE void transpose_block(const float* from, std::int64_t ld, float* to, std::int64_t to_ld) {
  using Four = ShortVector<float, 4>::type;
  using Unaligned = ShortVector<float, 4>::unaligned;
  const Four a = *reinterpret_cast<const Unaligned*>(from);
  const Four b = *reinterpret_cast<const Unaligned*>(from + ld);
  const Four c = *reinterpret_cast<const Unaligned*>(from + 2 * ld);
  const Four d = *reinterpret_cast<const Unaligned*>(from + 3 * ld);
  const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  *reinterpret_cast<Unaligned*>(to) = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  *reinterpret_cast<Unaligned*>(to + to_ld) = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  *reinterpret_cast<Unaligned*>(to + 2 * to_ld) = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  *reinterpret_cast<Unaligned*>(to + 3 * to_ld) = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}

MINIQUANT_INLINE void transpose_block(const double* from, std::int64_t ld, double* to, std::int64_t to_ld) {
  using Two = ShortVector<double, 2>::type;
  using Unaligned = ShortVector<double, 2>::unaligned;
  const Two a = *reinterpret_cast<const Unaligned*>(from);
  const Two b = *reinterpret_cast<const Unaligned*>(from + ld);
  *reinterpret_cast<Unaligned*>(to) = __builtin_shufflevector(a, b, 0, 2);
  *reinterpret_cast<Unaligned*>(to + to_ld) = __builtin_shufflevector(a, b, 1, 3);
}

MINIQUANT_INLINE void transpose_block(const std::int8_t* from, std::int64_t ld, std::int8_t* to, std::int64_t to_ld) {
  using Row = ShortVector<std::int8_t, 16>::type;
  using Unaligned = ShortVector<std::int8_t, 16>::unaligned;
  Row rows[2][16];
#pragma GCC unroll 16
  for (std::int64_t i = 0; i < 16; ++i) {
    rows[0][i] = *reinterpret_cast<const Unaligned*>(from + i * ld);
  }
  // Each step puts row i before row i + 8, element by element: after four an element's two indices are exchanged.
#pragma GCC unroll 4
  for (std::int64_t step = 0; step < 4; ++step) {
    const Row* const before = rows[step % 2];
    Row* const after = rows[(step + 1) % 2];
#pragma GCC unroll 8
    for (std::int64_t i = 0; i < 8; ++i) {
      after[2 * i] =
          __builtin_shufflevector(before[i], before[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      after[2 * i + 1] = __builtin_shufflevector(before[i], before[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                                 14, 30, 15, 31);
    }
  }
#pragma GCC unroll 16
  for (std::int64_t i = 0; i < 16; ++i) {
    *reinterpret_cast<Unaligned*>(to + i * to_ld) = rows[0][i];
  }
}

/// to[j][i] = from[i][j] for i < rows and j < width.
template <typename T>
void transpose(const T* from, std::int64_t ld, std::int64_t rows, std::int64_t width, T* to, std::int64_t to_ld) {
  const std::int64_t whole_rows = rows - rows % kBlock<T>;
  const std::int64_t whole_width = width - width % kBlock<T>;
  for (std::int64_t i = 0; i < whole_rows; i += kBlock<T>) {
    for (std::int64_t j = 0; j < whole_width; j += kBlock<T>) {
      transpose_block(from + i * ld + j, ld, to + j * to_ld + i, to_ld);
    }
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = i < whole_rows ? whole_width : 0; j < width; ++j) {
      to[j * to_ld + i] = from[i * ld + j];
    }
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
