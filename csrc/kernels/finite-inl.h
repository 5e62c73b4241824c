#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/vector-inl.h"

// The largest magnitude of values of any floating-point format, found on their bits: without the sign bit, values
// compare like the integers that their bits are, and every infinity and NaN is above all others (IEEE 754, 3.4).

namespace miniquant::kernels::MINIQUANT_KERNEL_ISA {
namespace {

/// max of `count` magnitudes as bits, 0 where there are none. Bits: the signed integer of the format's size.
template <typename Bits>
Bits largest_magnitude_bits(const Bits* values, std::int64_t count) {
  constexpr std::int64_t kValues = kVectorBytes / sizeof(Bits);
  using BitsVector [[gnu::vector_size(kVectorBytes)]] = Bits;
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  BitsVector largest = {};
  std::int64_t i = 0;
  for (; i + kValues <= count; i += kValues) {
    BitsVector magnitude;
    std::memcpy(&magnitude, values + i, sizeof(magnitude));
    magnitude &= kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  Bits result = 0;
  for (std::int64_t lane = 0; lane < kValues; ++lane) {
    result = largest[lane] > result ? largest[lane] : result;
  }
  for (; i < count; ++i) {
    const Bits value = values[i];
    const Bits magnitude = value < 0 ? static_cast<Bits>(value - std::numeric_limits<Bits>::min()) : value;
    result = magnitude > result ? magnitude : result;
  }
  return result;
}

}  // namespace
}  // namespace miniquant::kernels::MINIQUANT_KERNEL_ISA
