#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <miniquant/export.h>

#include <array>
#include <cstdint>

namespace miniquant {

/// hessian += X^T X for a batch of inputs, in place.
///
/// hessian: [K, K], float32 or float64, any strides; returned. inputs: [..., K], float32, float64, bfloat16 or float16;
/// cast to the Hessian's dtype before the product.
/// Throws c10::ValueError / c10::TypeError on bad arguments, values that are not finite among them; hessian is then as
/// it was.
MINIQUANT_API at::Tensor& hessian_update_(at::Tensor& hessian, const at::Tensor& inputs);

/// Which tokens an accumulator keeps apart.
enum class Halves {
  kTogether,
  /// One sum for either half of the tokens, so that choose_ridge() can judge what one half teaches by the other. A
  /// batch that is longer than all before it is cut in two; any other goes to the half that has fewer tokens, so that
  /// texts that come as batches of their own stay whole. Twice the memory.
  kApart,
};

/// Counts tokens and gives X X^T / n over any number of batches. How the tokens are split into batches changes the
/// result by rounding only.
class MINIQUANT_API HessianAccumulator {
 public:
  /// in_features: K, at least 0. dtype: of the sum, kFloat or kDouble. Throws c10::ValueError / c10::TypeError
  /// otherwise.
  explicit HessianAccumulator(int64_t in_features, at::ScalarType dtype = at::kFloat,
                              Halves halves = Halves::kTogether);

  /// Adds a batch [..., K]; its leading dimensions are tokens. Dtypes and errors as hessian_update_.
  void update(const at::Tensor& inputs);

  /// Tokens seen so far.
  [[nodiscard]] int64_t tokens() const { return tokens_[0] + tokens_[1]; }

  /// A new tensor [K, K]: X X^T / tokens. Throws c10::ValueError before the first token.
  [[nodiscard]] at::Tensor hessian() const;

  /// X X^T / tokens of the first or the second half (index 0 or 1), a new tensor [K, K]. Throws c10::ValueError for
  /// another index, where the halves are not kept apart, or that half has no token yet.
  [[nodiscard]] at::Tensor half(int64_t index) const;

  /// Tokens of the first or the second half so far. Throws c10::ValueError where the halves are not kept apart.
  [[nodiscard]] int64_t half_tokens(int64_t index) const;

 private:
  void add(int64_t index, const at::Tensor& inputs);

  std::array<at::Tensor, 2> sum_;  ///< the second is undefined unless halves are kept apart
  std::array<int64_t, 2> tokens_ = {0, 0};
};

}  // namespace miniquant
