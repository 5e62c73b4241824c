#pragma once

// The fixed inputs of the consumer programs, and one number that tells their codes apart from others. The same in
// Python: consumer_problem and codes_checksum in tests/python/conftest.py.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <cstdint>

constexpr int64_t kRows = 12;
constexpr int64_t kColumns = 96;

/// [12, 96] float32: ((7 r + 3 c + r c) mod 31 - 15) / 64, exact.
inline at::Tensor problem_weight() {
  at::Tensor weight = at::empty({kRows, kColumns}, at::kFloat);
  auto w = weight.accessor<float, 2>();
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t c = 0; c < kColumns; ++c) {
      w[r][c] = static_cast<float>((7 * r + 3 * c + r * c) % 31 - 15) / 64.0F;
    }
  }
  return weight;
}

/// [96, 96] float32: 2^-|r - c|, exact and positive definite; neighbouring inputs are correlated.
inline at::Tensor problem_hessian() {
  at::Tensor hessian = at::empty({kColumns, kColumns}, at::kFloat);
  auto h = hessian.accessor<float, 2>();
  for (int64_t r = 0; r < kColumns; ++r) {
    for (int64_t c = 0; c < kColumns; ++c) {
      h[r][c] = std::ldexp(1.0F, -static_cast<int>(r < c ? c - r : r - c));
    }
  }
  return hessian;
}

/// Sum over the codes in row-major order of (index + 1) * code: moves with any code and with their order.
inline int64_t codes_checksum(const at::Tensor& codes) {
  const at::Tensor flat = codes.contiguous();
  const int8_t* code = flat.const_data_ptr<int8_t>();
  int64_t sum = 0;
  for (int64_t i = 0; i < flat.numel(); ++i) {
    sum += (i + 1) * code[i];
  }
  return sum;
}
