#include "algorithms/power_of_two.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace miniquant::algorithms {

at::Tensor times_power_of_two(const at::Tensor& values, const at::Tensor& exponents) {
  TORCH_INTERNAL_ASSERT(values.numel() == exponents.numel());
  // A factor 2^exponent may be out of range where the product is in range.
  constexpr int64_t kMost = 10000;
  const at::Tensor wide = values.to(at::kCPU, at::kDouble, /*non_blocking=*/false, /*copy=*/true).contiguous();
  const at::Tensor shifts = exponents.cpu().contiguous();
  auto* const value = wide.mutable_data_ptr<double>();
  const auto* const shift = shifts.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < wide.numel(); ++i) {
    value[i] = std::ldexp(value[i], static_cast<int>(std::clamp(shift[i], -kMost, kMost)));
  }
  return wide.to(values.device(), values.scalar_type());
}

at::Tensor times_power_of_two(const at::Tensor& values, int64_t exponent) {
  return exponent == 0 ? values : times_power_of_two(values, at::full({values.numel()}, exponent, at::kLong));
}

}  // namespace miniquant::algorithms
