#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <miniquant/export.h>
#include <miniquant/options.h>

#include <cstdint>
#include <optional>

namespace miniquant {

/// hessian += X^T X for a batch of inputs, in place.
///
/// hessian: [K, K], float32 or float64, any strides; returned. inputs: [..., K], float32, float64, bfloat16 or float16;
/// cast to the Hessian's dtype before the product.
/// Throws c10::ValueError / c10::TypeError on bad arguments, among them values that are not finite or whose products
/// would not be; hessian is then as it was. Threads may update one tensor at a time: calls wait for one another.
MINIQUANT_API at::Tensor& hessian_update_(at::Tensor& hessian, const at::Tensor& inputs);

/// Which tokens an accumulator keeps apart.
enum class Halves {
  kTogether,
  /// One sum for either half of the tokens, for choose_ridge() to judge what one half teaches by the other. A batch
  /// that is longer than all before it is cut in two; any other goes to the half that has fewer tokens, so texts that
  /// come as batches of their own stay whole. Twice the memory.
  kApart,
};

/// Counts tokens and gives X X^T / n over any number of batches. How the tokens are split into batches changes the
/// result by rounding only.
///
/// A call that throws changes nothing. Threads may share an accumulator: calls wait for one another (the sum then
/// depends on their order, by rounding only). A process that has used it must not fork and go on: the locks and the
/// pool of threads of the parent do not work in the child. A copy shares the sums with what it was copied from.
class MINIQUANT_API HessianAccumulator {
 public:
  /// in_features: K, at least 0. dtype: of the sum, kFloat or kDouble. Throws c10::ValueError / c10::TypeError
  /// otherwise.
  explicit HessianAccumulator(int64_t in_features, at::ScalarType dtype = at::kFloat,
                              Halves halves = Halves::kTogether);

  /// Goes on from what an accumulator kept, or from sums that were made elsewhere; the tensors are copied. Throws
  /// c10::ValueError / c10::TypeError for tensors that are no state of an accumulator.
  explicit HessianAccumulator(const HessianSums& state);

  /// Adds a batch [..., K]; its leading dimensions are tokens. Dtypes and errors as hessian_update_.
  /// mask: bool [...], true for tokens that count; token_weights: floating point [...], finite and not negative, what
  /// each token counts. Tokens that are masked or have weight 0 are not looked at.
  void update(const at::Tensor& inputs, const std::optional<at::Tensor>& mask = std::nullopt,
              const std::optional<at::Tensor>& token_weights = std::nullopt);

  /// Adds what another accumulator of the same in_features, dtype and halves has seen.
  void merge(const HessianAccumulator& other);

  /// A copy of what is kept.
  [[nodiscard]] HessianSums state() const;

  /// Tokens that counted so far.
  [[nodiscard]] int64_t tokens() const;

  /// (sum of weights)^2 / sum of their squares: how many tokens of equal weight say as much; tokens() without weights.
  [[nodiscard]] double effective_tokens() const;

  /// A new tensor [K, K]: X diag(w) X^T / (sum of w), X X^T / tokens without weights. Throws c10::ValueError before the
  /// first token.
  [[nodiscard]] at::Tensor hessian() const;

  /// The same of the first or the second half (index 0 or 1). Throws c10::ValueError for another index, where the
  /// halves are not kept apart, or that half has no token yet.
  [[nodiscard]] at::Tensor half(int64_t index) const;

  /// Tokens of the first or the second half so far. Throws c10::ValueError as half().
  [[nodiscard]] int64_t half_tokens(int64_t index) const;

 private:
  HessianSums sums_;
};

}  // namespace miniquant
