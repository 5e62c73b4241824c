#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <miniquant/export.h>

#include <cstdint>

namespace miniquant {

/// hessian += X^T X for a batch of inputs, in place.
///
/// hessian: [K, K], float32 or float64. inputs: [..., K], any floating dtype; cast to the Hessian's before the product.
MINIQUANT_API at::Tensor& hessian_update_(at::Tensor& hessian, const at::Tensor& inputs);

/// Counts tokens and gives X X^T / n over any number of batches. How the tokens are split into batches changes the
/// result by rounding only.
class MINIQUANT_API HessianAccumulator {
 public:
  /// in_features: K. dtype: of the sum, kFloat or kDouble.
  explicit HessianAccumulator(int64_t in_features, at::ScalarType dtype = at::kFloat);

  /// Adds a batch [..., K]; its leading dimensions are tokens.
  void update(const at::Tensor& inputs);

  /// Tokens seen so far.
  [[nodiscard]] int64_t tokens() const { return tokens_; }

  /// A new tensor [K, K]: X X^T / tokens. Throws c10::ValueError before the first token.
  [[nodiscard]] at::Tensor hessian() const;

 private:
  at::Tensor sum_;
  int64_t tokens_ = 0;
};

}  // namespace miniquant
