#pragma once

#include <cstdint>

#include "kernels/target-inl.h"

// The compiler's vectors, of any number of elements, with operations for any instruction set. A file
// vector_<instruction set>-inl.h specializes the operations that it does faster.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// `kCount` values of T.
template <typename T, std::int64_t kCount>
struct ShortVector {
  using type __attribute__((vector_size(kCount * sizeof(T)))) = T;
  using unaligned __attribute__((vector_size(kCount * sizeof(T)), aligned(1), may_alias)) = T;
};

/// The integer as wide as T.
template <typename T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = std::int32_t;
};
template <>
struct IntegerOf<double> {
  using type = std::int64_t;
};

/// `kCount` values of T as fours of lanes; no operation mixes two fours.
template <typename T, std::int64_t kCount>
struct Fours {
  using Values = ShortVector<T, kCount>::type;
  using Integers = ShortVector<typename IntegerOf<T>::type, kCount>::type;

  /// In each four, the values of its lanes `from`, 0 to 3.
  static MINIQUANT_INLINE Values permute(Values values, Integers from) {
    Values result;
    for (std::int64_t lane = 0; lane < kCount; ++lane) {
      result[lane] = values[lane / 4 * 4 + from[lane]];
    }
    return result;
  }

  /// In each four, every kWith lanes (1 or 2) exchanged with the next kWith.
  template <std::int64_t kWith>
  static MINIQUANT_INLINE Integers exchange(Integers values) {
    static_assert(kWith == 1 || kWith == 2);
    Integers result;
    for (std::int64_t lane = 0; lane < kCount; ++lane) {
      result[lane] = values[lane / kWith % 2 == 0 ? lane + kWith : lane - kWith];
    }
    return result;
  }
};

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
