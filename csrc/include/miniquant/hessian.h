#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <miniquant/export.h>
#include <miniquant/options.h>

#include <cstdint>
#include <optional>

namespace miniquant {

/// Adds X^T diag(w) X of a batch of inputs X to `hessian`, in place, and returns `hessian`.
///
/// hessian: [K, K], float32 or float64, any strides. inputs: [..., K], float32, float64, bfloat16 or float16; cast to
/// the dtype of `hessian` before the product. The order of the sums does not depend on the number of threads, but on
/// the instruction set and on bfloat16_unit(). Throws c10::ValueError / c10::TypeError on bad arguments, including
/// inputs that are not finite or that make a sum overflow; `hessian` is then unchanged. Threads may update the same
/// tensor: calls wait for one another. token_weights: w, floating point [...], finite and not negative, one for each
/// token; 1 each without. The inputs of tokens of weight 0 are not read. precision: of the products.
MINIQUANT_API at::Tensor& hessian_update_(at::Tensor& hessian, const at::Tensor& inputs,
                                          const std::optional<at::Tensor>& token_weights = std::nullopt,
                                          HessianPrecision precision = HessianPrecision::kFull);

/// Adds X^T Y of two batches of the same tokens to `sum`, in place, and returns `sum`: where the Hessian says what a
/// layer's inputs have in common with themselves, such a sum says what they have in common with errors.
///
/// sum: [M, K], float32 or float64, any strides. left: X [..., M]; right: Y [..., K]; dtypes and errors as of the
/// inputs of hessian_update_(), leading dimensions equal. Values of 16 bits on both sides are multiplied as those of a
/// Hessian are, where the CPU has a unit for that and `sum` is float32. Other products come from ATen where it has MKL,
/// except on CPUs with AVX-512 that are not Intel's, where MKL is slower. The order of the sums does not depend on the
/// number of threads where the products are not ATen's.
MINIQUANT_API at::Tensor& product_update_(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right);

/// Whether an accumulator keeps one sum, or one for each half of the tokens.
enum class Halves {
  kTogether,
  /// One sum for each half of the tokens, so choose_ridge() can quantize with one half and measure with the other. A
  /// batch with more tokens than all batches before it together is cut in two; any other batch goes whole to the half
  /// with fewer tokens, so texts that are batches of their own stay whole. Takes twice the memory.
  kApart,
};

/// Computes X X^T / n over any number of batches and counts their tokens. How the tokens are split into batches changes
/// the result by rounding only.
///
/// A call that throws changes nothing. Threads may share an accumulator: calls wait for one another, and their order
/// changes the sum by rounding only. A child process made by fork() must not use an accumulator that its parent has
/// used: the parent's locks and thread pool do not work in the child. A copy shares its sums with the original.
class MINIQUANT_API HessianAccumulator {
 public:
  /// in_features: K, at least 0. dtype: that of the sum, kFloat or kDouble. Throws c10::ValueError / c10::TypeError for
  /// other values.
  explicit HessianAccumulator(int64_t in_features, at::ScalarType dtype = at::kFloat, Halves halves = Halves::kTogether,
                              HessianPrecision precision = HessianPrecision::kFull);

  /// Starts from the state() of an accumulator, or from sums computed elsewhere; the tensors are copied. Throws
  /// c10::ValueError / c10::TypeError where the tensors are not a valid state.
  explicit HessianAccumulator(const HessianSums& state, HessianPrecision precision = HessianPrecision::kFull);

  /// Adds a batch [..., K]; all dimensions but the last are tokens. Dtypes and errors as hessian_update_().
  /// mask: bool [...], true for tokens to count. token_weights: floating point [...], finite and not negative, the
  /// weight of each token. The inputs of tokens that are masked or have weight 0 are not read.
  void update(const at::Tensor& inputs, const std::optional<at::Tensor>& mask = std::nullopt,
              const std::optional<at::Tensor>& token_weights = std::nullopt);

  /// Adds the tokens of another accumulator with the same in_features, dtype and halves. Throws c10::ValueError /
  /// c10::TypeError for any other accumulator.
  void merge(const HessianAccumulator& other);

  /// A copy of the sums and counts.
  [[nodiscard]] HessianSums state() const;

  /// The number of tokens counted so far.
  [[nodiscard]] int64_t tokens() const;

  /// (sum of weights)^2 / sum of squared weights: the number of tokens of equal weight that carry as much information;
  /// tokens() without weights.
  [[nodiscard]] double effective_tokens() const;

  /// A new tensor [K, K]: X diag(w) X^T / (sum of w), or X X^T / tokens() without weights. Throws c10::ValueError
  /// before the first token.
  [[nodiscard]] at::Tensor hessian() const;

  /// The same for the first or the second half (index 0 or 1). Throws c10::ValueError for another index, where the
  /// halves are not kept apart, or where that half has no token yet.
  [[nodiscard]] at::Tensor half(int64_t index) const;

  /// The number of tokens in the first or the second half so far. Throws c10::ValueError as half().
  [[nodiscard]] int64_t half_tokens(int64_t index) const;

 private:
  HessianSums sums_;
  HessianPrecision precision_;
};

}  // namespace miniquant
