#include "algorithms/finite.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <iterator>
#include <limits>
#include <vector>

#include "algorithms/parallel.h"
#include "kernels/arithmetic.h"
#include "kernels/kernels.h"

namespace miniquant::algorithms {
namespace {

/// Values in one piece of work.
constexpr int64_t kPiece = 16'384;

/// The chosen instruction set's kernel for values of the size of Bits.
template <typename Bits>
auto largest_magnitude_bits() {
  if constexpr (sizeof(Bits) == 2) {
    return kernels::kernels().largest_magnitude_bits_16;
  } else if constexpr (sizeof(Bits) == 4) {
    return kernels::kernels().largest_magnitude_bits_32;
  } else {
    return kernels::kernels().largest_magnitude_bits_64;
  }
}

/// The bits of the largest magnitude of a dense tensor.
template <typename Bits>
Bits largest_bits(const at::Tensor& tensor) {
  const auto kernel = largest_magnitude_bits<Bits>();
  const int64_t count = tensor.numel();
  const auto* const values = static_cast<const Bits*>(tensor.const_data_ptr());
  std::vector<Bits> of_piece(kernels::ceil_div(count, kPiece));
  for_pieces(std::ssize(of_piece), kOperationsPerEntryRead * count, [&](int64_t piece) {
    const int64_t begin = piece * kPiece;
    of_piece[piece] = kernel(values + begin, std::min(kPiece, count - begin));
  });
  return count == 0 ? Bits(0) : *std::ranges::max_element(of_piece);
}

/// body.operator()<T, Bits>() for a dense tensor on the CPU of elements T, with the integer of T's size. Returns false
/// where the tensor is another.
template <typename Body>
bool dispatch_bits(const at::Tensor& tensor, const Body& body) {
  if (!tensor.is_cpu() || !tensor.is_non_overlapping_and_dense()) {
    return false;
  }
  switch (tensor.scalar_type()) {
    case at::kFloat:
      body.template operator()<float, int32_t>();
      return true;
    case at::kDouble:
      body.template operator()<double, int64_t>();
      return true;
    case at::kBFloat16:
      body.template operator()<c10::BFloat16, int16_t>();
      return true;
    case at::kHalf:
      body.template operator()<c10::Half, int16_t>();
      return true;
    default:
      return false;
  }
}

}  // namespace

double largest_magnitude(const at::Tensor& tensor) {
  double largest = 0.0;
  if (dispatch_bits(tensor, [&]<typename T, typename Bits> {
        largest = static_cast<double>(std::bit_cast<T>(largest_bits<Bits>(tensor)));
      })) {
    return largest;
  }
  return tensor.numel() == 0 ? 0.0 : tensor.abs().max().to(at::kDouble).item<double>();
}

bool all_finite(const at::Tensor& tensor) {
  bool finite = true;
  if (dispatch_bits(tensor, [&]<typename T, typename Bits> {
        finite = largest_bits<Bits>(tensor) < std::bit_cast<Bits>(std::numeric_limits<T>::infinity());
      })) {
    return finite;
  }
  return at::isfinite(tensor).all().item<bool>();
}

}  // namespace miniquant::algorithms
