#include "algorithms/finite.h"

#include <ATen/ops/isfinite.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

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

template <typename Bits>
bool all_finite(const at::Tensor& tensor, Bits exponent) {
  constexpr int64_t kPiece = 65'536;
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

}  // namespace

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
