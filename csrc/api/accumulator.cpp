#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <string_view>
#include <tuple>

#include "algorithms/large_pages.h"
#include "miniquant/hessian.h"
#include "miniquant/names.h"
#include "ops/find_operator.h"

namespace miniquant {
namespace {

using OptionalTensor = const std::optional<at::Tensor>&;
using Counts = std::tuple<at::Tensor, at::Tensor>;

void add(HessianSums& sums, const HessianSums& other) {
  static const auto op =
      ops::find_operator<void(at::Tensor&, at::Tensor&, at::Tensor&, const at::Tensor&, const at::Tensor&,
                              const at::Tensor&)>("miniquant::accumulator_merge_");
  op.call(sums.sums, sums.tokens, sums.weights, other.sums, other.tokens, other.weights);
}

/// Sums of no tokens, in the shapes of `like`. Never inference tensors, so any mode can update them.
HessianSums no_tokens(const HessianSums& like) {
  const c10::InferenceMode normal(false);
  return {algorithms::empty_in_large_pages(like.sums.sizes(), like.sums.scalar_type()).zero_(),
          at::zeros_like(like.tokens), at::zeros_like(like.weights)};
}

at::Tensor hessian_of(const HessianSums& sums, std::optional<int64_t> half) {
  static const auto op =
      ops::find_operator<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, std::optional<int64_t>)>(
          "miniquant::accumulator_hessian");
  return op.call(sums.sums, sums.tokens, sums.weights, half);
}

/// The numbers of tokens and of effective tokens.
Counts counts_of(const HessianSums& sums, std::optional<int64_t> half) {
  static const auto op =
      ops::find_operator<Counts(const at::Tensor&, const at::Tensor&, const at::Tensor&, std::optional<int64_t>)>(
          "miniquant::accumulator_tokens");
  return op.call(sums.sums, sums.tokens, sums.weights, half);
}

}  // namespace

HessianAccumulator::HessianAccumulator(int64_t in_features, at::ScalarType dtype, Halves halves,
                                       HessianPrecision precision)
    : precision_(precision) {
  TORCH_CHECK_VALUE(in_features >= 0, "HessianAccumulator: expected in_features to be at least 0, but got ",
                    in_features);
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble,
                   "HessianAccumulator: expected dtype to be float32 or float64, but got ",
                   c10::getDtypeNames(dtype).first);
  const c10::InferenceMode normal(false);
  const int64_t count = halves == Halves::kApart ? 2 : 1;
  sums_ = {algorithms::empty_in_large_pages({count, in_features, in_features}, dtype).zero_(),
           at::zeros({count}, at::kLong), at::zeros({2, count}, at::kDouble)};
}

HessianAccumulator::HessianAccumulator(const HessianSums& state, HessianPrecision precision)
    : sums_(no_tokens(state)), precision_(precision) {
  add(sums_, state);
}

void HessianAccumulator::update(const at::Tensor& inputs, const std::optional<at::Tensor>& mask,
                                const std::optional<at::Tensor>& token_weights) {
  static const auto op =
      ops::find_operator<void(at::Tensor&, at::Tensor&, at::Tensor&, const at::Tensor&, OptionalTensor, OptionalTensor,
                              std::string_view)>("miniquant::accumulator_update_");
  op.call(sums_.sums, sums_.tokens, sums_.weights, inputs, mask, token_weights, name_of(precision_));
}

void HessianAccumulator::merge(const HessianAccumulator& other) { add(sums_, other.sums_); }

HessianSums HessianAccumulator::state() const {
  HessianSums copy = no_tokens(sums_);
  add(copy, sums_);
  return copy;
}

int64_t HessianAccumulator::tokens() const { return std::get<0>(counts_of(sums_, std::nullopt)).item<int64_t>(); }

double HessianAccumulator::effective_tokens() const {
  return std::get<1>(counts_of(sums_, std::nullopt)).item<double>();
}

at::Tensor HessianAccumulator::hessian() const { return hessian_of(sums_, std::nullopt); }

at::Tensor HessianAccumulator::half(int64_t index) const { return hessian_of(sums_, index); }

int64_t HessianAccumulator::half_tokens(int64_t index) const {
  return std::get<0>(counts_of(sums_, index)).item<int64_t>();
}

}  // namespace miniquant
