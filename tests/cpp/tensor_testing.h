#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/randn.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <string>

// Shared by the tests with tensors.

namespace miniquant::testing {

/// Standard normal values; the same for the same seed.
inline at::Tensor normal(at::IntArrayRef sizes, std::uint64_t seed, at::ScalarType dtype = at::kDouble) {
  return at::randn(sizes, at::detail::createCPUGenerator(seed), at::TensorOptions().dtype(at::kDouble)).to(dtype);
}

/// X^T X / n of n = `tokens` correlated inputs X [n, columns].
inline at::Tensor hessian_of_inputs(std::int64_t columns, std::int64_t tokens, std::uint64_t seed,
                                    at::ScalarType dtype = at::kDouble) {
  const at::Tensor inputs = normal({tokens, columns}, seed).cumsum(1).div_(4).add_(normal({tokens, columns}, seed + 1));
  return inputs.mT().matmul(inputs).div_(tokens).to(dtype);
}

/// (H + H^T) / 2 + ridge * mean(diag H) * I.
inline at::Tensor damped(const at::Tensor& hessian, double ridge) {
  at::Tensor matrix = (hessian + hessian.mT()) / 2;
  matrix.diagonal().add_(ridge * hessian.diagonal().mean());
  return matrix;
}

/// Sets the number of threads for one scope.
class ScopedThreads {
 public:
  explicit ScopedThreads(int threads) : before_(at::get_num_threads()) { at::set_num_threads(threads); }
  ScopedThreads(const ScopedThreads&) = delete;
  ScopedThreads& operator=(const ScopedThreads&) = delete;
  ~ScopedThreads() { at::set_num_threads(before_); }

 private:
  int before_;
};

/// The message of the c10::Error of type Error that body() throws; "no exception" if it throws none.
template <typename Error, typename Body>
std::string message_of(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what_without_backtrace();
  } catch (const c10::Error& error) {
    return std::string("another type of error: ") + error.what_without_backtrace();
  }
  return "no exception";
}

/// The number of elements in which two tensors of one shape differ.
inline std::int64_t differences(const at::Tensor& a, const at::Tensor& b) { return a.ne(b).sum().item<std::int64_t>(); }

}  // namespace miniquant::testing
