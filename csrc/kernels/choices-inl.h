#pragma once

#include <cstdint>

#include "kernels/triangle.h"
#include "kernels/vector-inl.h"

// The vectors of a beam search: kBeamWidth choices of each of as many jobs, one scale of one row, as a register holds.
// Choices are numbered within their job; no operation mixes the choices of two jobs.

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// Number of partial choices that a beam search keeps.
constexpr std::int64_t kBeamWidth = 4;  // Fours

/// Columns whose errors are collected before they are added to later columns.
constexpr std::int64_t kBeamColumns = 8;
static_assert(kPanelColumns % kBeamColumns == 0);

/// Searches that run side by side: one computes while the others wait for their own results.
constexpr std::int64_t kBeamsAtOnce = 3;

template <typename T>
constexpr std::int64_t kBeamLanes = kLanes<T> < kBeamWidth ? kBeamWidth : kLanes<T>;

template <typename T>
constexpr std::int64_t kJobsPerBeam = kBeamLanes<T> / kBeamWidth;

/// One value for each choice.
template <typename T>
using Choices = Fours<T, kBeamLanes<T>>::Values;

/// One integer for each choice.
template <typename T>
using ChoiceIntegers = Fours<T, kBeamLanes<T>>::Integers;

template <typename T>
MINIQUANT_INLINE Choices<T> for_each_choice(T value) {
  return value - Choices<T>{};
}

/// a * b + c, fused if the instruction set can.
template <typename T>
MINIQUANT_INLINE Choices<T> multiply_add_choices(Choices<T> a, Choices<T> b, Choices<T> c) {
  if constexpr (kBeamLanes<T> == kLanes<T>) {
    return reinterpret_cast<Choices<T>>(
        multiply_add(reinterpret_cast<Vector<T>>(a), reinterpret_cast<Vector<T>>(b), reinterpret_cast<Vector<T>>(c)));
  } else {
    return a * b + c;
  }
}

/// 1 or -1.
template <typename T>
MINIQUANT_INLINE Choices<T> one_with_sign_of(Choices<T> values) {
  const Choices<T> sign = for_each_choice<T>(T(-0.0));
  const Choices<T> one = for_each_choice<T>(T(1));
  return reinterpret_cast<Choices<T>>(
      (reinterpret_cast<ChoiceIntegers<T>>(values) & reinterpret_cast<ChoiceIntegers<T>>(sign)) |
      reinterpret_cast<ChoiceIntegers<T>>(one));
}

/// For each job, the choices numbered `from`, 0 to 3.
template <typename T>
MINIQUANT_INLINE Choices<T> permute(Choices<T> values, ChoiceIntegers<T> from) {
  return Fours<T, kBeamLanes<T>>::permute(values, from);
}

/// For each job, every kWith integers exchanged with the next kWith.
template <std::int64_t kWith, typename T>
MINIQUANT_INLINE ChoiceIntegers<T> exchange(ChoiceIntegers<T> values) {
  return Fours<T, kBeamLanes<T>>::template exchange<kWith>(values);
}

/// For each choice, the value given for its number.
template <typename T>
MINIQUANT_INLINE ChoiceIntegers<T> by_number(int first, int second, int third, int fourth) {
  const int values[kBeamWidth] = {first, second, third, fourth};
  ChoiceIntegers<T> result;
  for (std::int64_t lane = 0; lane < kBeamLanes<T>; ++lane) {
    result[lane] = values[lane % kBeamWidth];
  }
  return result;
}

/// One step of a sorting network: of a key and its partner, the smaller where `smaller` is not 0, otherwise the larger.
template <std::int64_t kWith, typename T>
MINIQUANT_INLINE ChoiceIntegers<T> compare_exchange(ChoiceIntegers<T> keys, ChoiceIntegers<T> smaller) {
  const ChoiceIntegers<T> partner = exchange<kWith, T>(keys);
  const ChoiceIntegers<T> low = keys < partner ? keys : partner;
  const ChoiceIntegers<T> high = keys < partner ? partner : keys;
  return smaller != 0 ? low : high;
}

/// Sorts the four keys of each job: a bitonic sort.
template <bool kAscending, typename T>
MINIQUANT_INLINE ChoiceIntegers<T> sort(ChoiceIntegers<T> keys) {
  constexpr int kUp = kAscending ? 1 : 0;
  constexpr int kDown = 1 - kUp;
  keys = compare_exchange<1, T>(keys, by_number<T>(kUp, kDown, kDown, kUp));
  keys = compare_exchange<2, T>(keys, by_number<T>(kUp, kUp, kDown, kDown));
  return compare_exchange<1, T>(keys, by_number<T>(kUp, kDown, kUp, kDown));
}

/// Number of choices that a key tells apart: those of two vectors.
constexpr std::int64_t kChoicesPerKey = 2 * kBeamWidth;

/// An integer that orders choices by loss (not negative), then by number.
template <typename T>
MINIQUANT_INLINE ChoiceIntegers<T> key_of(Choices<T> loss, ChoiceIntegers<T> number) {
  using Integer = IntegerOf<T>::type;
  return (reinterpret_cast<ChoiceIntegers<T>>(loss) & static_cast<Integer>(-kChoicesPerKey)) | number;
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
