#include "algorithms/finite.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <iterator>
#include <limits>
#include <type_traits>
#include <vector>

#include "algorithms/parallel.h"
#include "kernels/arithmetic.h"

namespace miniquant::algorithms {
namespace {

/// Whether all bits of an exponent are set: the encoding of infinities and NaN (IEEE 754, 3.4).
template <typename Bits>
bool any_with_exponent(const Bits* values, int64_t count, Bits exponent) {
  Bits found = 0;
  for (int64_t i = 0; i < count; ++i) {
    found |= static_cast<Bits>((values[i] & exponent) == exponent);
  }
  return found != 0;
}

constexpr int64_t kPiece = 65'536;

template <typename Bits>
bool all_finite(const at::Tensor& tensor, Bits exponent) {
  const int64_t count = tensor.numel();
  const auto* const values = static_cast<const Bits*>(tensor.const_data_ptr());
  std::atomic<bool> finite = true;
  for_pieces(kernels::ceil_div(count, kPiece), count, [&](int64_t piece) {
    const int64_t begin = piece * kPiece;
    if (any_with_exponent(values + begin, std::min(kPiece, count - begin), exponent)) {
      finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite.load();
}

/// The bits of a value without its sign.
template <typename Bits>
Bits magnitude_of(Bits value) {
  using Unsigned = std::make_unsigned_t<Bits>;
  return static_cast<Bits>(static_cast<Unsigned>(value) & static_cast<Unsigned>(std::numeric_limits<Bits>::max()));
}

/// max of `count` magnitudes, as bits: magnitudes compare like the integers that their bits are, and every infinity and
/// NaN is above all others.
template <typename Bits>
Bits largest_bits(const Bits* values, int64_t count) {
  constexpr int64_t kLanes = 64 / sizeof(Bits);  // independent maxima, so the loop is vectorized
  std::array<Bits, kLanes> largest{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const auto magnitude = magnitude_of(values[i + lane]);
      largest[lane] = magnitude > largest[lane] ? magnitude : largest[lane];
    }
  }
  for (; i < count; ++i) {
    largest[0] = std::max(largest[0], magnitude_of(values[i]));
  }
  return *std::ranges::max_element(largest);
}

template <typename T, typename Bits>
T largest_magnitude(const at::Tensor& tensor) {
  const int64_t count = tensor.numel();
  const auto* const values = static_cast<const Bits*>(tensor.const_data_ptr());
  std::vector<Bits> of_piece(kernels::ceil_div(count, kPiece));
  for_pieces(std::ssize(of_piece), count, [&](int64_t piece) {
    const int64_t begin = piece * kPiece;
    of_piece[piece] = largest_bits(values + begin, std::min(kPiece, count - begin));
  });
  return count == 0 ? T(0) : std::bit_cast<T>(*std::ranges::max_element(of_piece));
}

}  // namespace

double largest_magnitude(const at::Tensor& tensor) {
  if (tensor.is_cpu() && tensor.is_non_overlapping_and_dense()) {
    switch (tensor.scalar_type()) {
      case at::kFloat:
        return largest_magnitude<float, int32_t>(tensor);
      case at::kDouble:
        return largest_magnitude<double, int64_t>(tensor);
      case at::kBFloat16:
        return largest_magnitude<c10::BFloat16, int16_t>(tensor);
      case at::kHalf:
        return largest_magnitude<c10::Half, int16_t>(tensor);
      default:
        break;
    }
  }
  return tensor.numel() == 0 ? 0.0 : tensor.abs().max().to(at::kDouble).item<double>();
}

bool all_finite(const at::Tensor& tensor) {
  if (tensor.is_cpu() && tensor.is_non_overlapping_and_dense()) {
    switch (tensor.scalar_type()) {
      case at::kFloat:
        return all_finite<uint32_t>(tensor, 0x7F80'0000U);
      case at::kDouble:
        return all_finite<uint64_t>(tensor, 0x7FF0'0000'0000'0000U);
      case at::kBFloat16:
        return all_finite<uint16_t>(tensor, 0x7F80U);
      case at::kHalf:
        return all_finite<uint16_t>(tensor, 0x7C00U);
      default:
        break;
    }
  }
  return at::isfinite(tensor).all().item<bool>();
}

}  // namespace miniquant::algorithms
