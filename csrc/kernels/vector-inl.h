#pragma once

#include <cstdint>

#include "kernels/short_vector-inl.h"
#include "kernels/target-inl.h"
#include "kernels/triangle.h"
#include MINIQUANT_VECTOR_HEADER

// One register of T, for the instruction set that this compilation is for.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

template <typename T>
struct VectorOf {
  using type __attribute__((vector_size(kVectorBytes), may_alias)) = T;
  using unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias)) = T;
};
template <typename T>
using Vector = VectorOf<T>::type;

template <typename T>
constexpr std::int64_t kLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(T));

/// Lanes (rows of W in a sweep) that one call of the innermost loop processes.
template <typename T>
constexpr std::int64_t kTileRows = kVectorsPerTile * kLanes<T>;
static_assert(kPanelColumns % kTileRows<float> == 0 && kPanelColumns % kStripColumns == 0);
static_assert(kTileRows<double> % kStripColumns == 0);
static_assert(kSpareRows >= kStripColumns - 1);

/// Column j of an array [columns][lane], or group j of [groups][lane], with elements T or others that belong to lanes
/// of T.
template <typename T, typename Element>
MINIQUANT_INLINE Element* column_of(Element* array, std::int64_t j) {
  return array + j * kTileRows<T>;
}

template <typename T>
MINIQUANT_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const VectorOf<T>::unaligned*>(from);
}

template <typename T>
MINIQUANT_INLINE void store(T* to, Vector<T> value) {
  *reinterpret_cast<VectorOf<T>::unaligned*>(to) = value;
}

template <typename T>
MINIQUANT_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

/// to[lane] = value[lane], integers within int8. Overloads, because GCC converts no vectors of a dependent type.
MINIQUANT_INLINE void store_codes(std::int8_t* to, Vector<float> value) {
  const auto integers = __builtin_convertvector(value, ShortVector<std::int32_t, kLanes<float>>::type);
  *reinterpret_cast<ShortVector<std::int8_t, kLanes<float>>::unaligned*>(to) =
      __builtin_convertvector(integers, ShortVector<std::int8_t, kLanes<float>>::type);
}

MINIQUANT_INLINE void store_codes(std::int8_t* to, Vector<double> value) {
  for (std::int64_t lane = 0; lane < kLanes<double>; ++lane) {
    to[lane] = static_cast<std::int8_t>(static_cast<std::int32_t>(value[lane]));
  }
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
