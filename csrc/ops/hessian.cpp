#include "algorithms/hessian.h"

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "algorithms/finite.h"
#include "algorithms/large_pages.h"
#include "algorithms/product.h"
#include "ops/checks.h"
#include "ops/names.h"
#include "ops/plain_operations.h"
#include "ops/storage_lock.h"

// The operators that sum X^T X, or X^T Y, in place: hessian_update_ and product_update_ on one tensor, accumulator_* on
// the state of a HessianAccumulator (miniquant::HessianSums). Everything is checked before anything changes. Each
// operator holds the lock of the memory it changes or reads, so threads may share a sum.

namespace miniquant::ops {
namespace {

constexpr const char* kAccumulator = "HessianAccumulator";
using OptionalTensor = std::optional<at::Tensor>;

/// Increments the version counter that autograd reads, because no generated kernel above these operators does.
/// Inference tensors have no counter.
void count_change(const at::Tensor& tensor) {
  if (!tensor.is_inference()) {
    tensor.unsafeGetTensorImpl()->bump_version();
  }
}

void check_may_change(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(!tensor.is_inference() || c10::InferenceMode::is_enabled(), op, ": expected ", argument,
                    " to be a normal tensor outside inference mode, but got an inference tensor (clone it)");
}

/// The tokens of a batch that count: not masked, and with a weight above 0.
struct Batch {
  at::Tensor inputs;         ///< [n, K]
  at::Tensor token_weights;  ///< float64 [n], positive; undefined where all are 1
  at::Tensor counted;        ///< bool, of the shape of the caller's tokens; undefined where all count
};

/// `bad`, but false for tokens that do not count, so positions are those of the caller's batch.
at::Tensor where_counted(const at::Tensor& bad, const at::Tensor& counted) {
  return counted.defined() ? bad.logical_and(counted.unsqueeze(-1)) : bad;
}

at::Tensor flat_tokens(const at::Tensor& inputs) {
  return inputs.dim() == 1 ? inputs.unsqueeze(0) : inputs.flatten(0, -2);
}

/// The tokens that count; the inputs of the others are not read.
Batch counted_tokens(const char* op, const at::Tensor& inputs, const OptionalTensor& mask,
                     const OptionalTensor& token_weights) {
  Batch batch{flat_tokens(inputs), {}, {}};
  if (mask.has_value()) {
    batch.counted = *mask;
  }
  if (token_weights.has_value()) {
    at::Tensor bad = at::isfinite(*token_weights).logical_and(token_weights->ge(0)).logical_not();
    bad = batch.counted.defined() ? bad.logical_and(batch.counted) : bad;
    TORCH_CHECK_VALUE(!bad.any().item<bool>(), op, ": expected token_weights to be finite and not negative, but got ",
                      first_value(*token_weights, bad));
    const at::Tensor positive = token_weights->gt(0);
    batch.counted = batch.counted.defined() ? batch.counted.logical_and(positive) : positive;
    batch.token_weights = token_weights->flatten().to(at::kDouble);
  }
  if (batch.counted.defined() && !batch.counted.all().item<bool>()) {
    const at::Tensor kept = batch.counted.flatten().nonzero().squeeze(1);
    batch.inputs = batch.inputs.index_select(0, kept);
    if (batch.token_weights.defined()) {
      batch.token_weights = batch.token_weights.index_select(0, kept);
    }
  }
  return batch;
}

double largest_of(at::ScalarType dtype) {
  return dtype == at::kDouble ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
}

/// float64 [K]: the diagonal of all sums [S, K, K] together.
at::Tensor diagonal_of(const at::Tensor& sums) { return sums.diagonal(0, 1, 2).to(at::kDouble).sum(0); }

/// At least the largest entry of diagonal_of(), in one short loop: batches may be small.
double bound_of_diagonal(const at::Tensor& sums) {
  double bound = 0.0;
  AT_DISPATCH_FLOATING_TYPES(sums.scalar_type(), "bound_of_diagonal", [&] {
    const auto of_sum = sums.accessor<const scalar_t, 3>();
    for (int64_t sum = 0; sum < sums.size(0); ++sum) {
      double largest = 0.0;
      for (int64_t j = 0; j < sums.size(1); ++j) {
        largest = std::max(largest, static_cast<double>(of_sum[sum][j][j]));
      }
      bound += largest;
    }
  });
  return bound;
}

/// Rejects a batch with values that are not finite, or that would overflow `sums` [S, K, K] together.
void check_batch_values(const char* op, const at::Tensor& inputs, const Batch& batch, const at::Tensor& sums) {
  if (batch.inputs.numel() == 0) {
    return;
  }
  const at::ScalarType dtype = sums.scalar_type();
  // No entry of a sum of x x^T exceeds its largest diagonal entry, and that grows by at most n max |X|^2. So one cheap
  // pass is enough to accept almost any batch.
  const double max = largest_of(dtype);
  const double largest = algorithms::largest_magnitude(batch.inputs);
  const auto tokens = static_cast<double>(batch.inputs.size(0));
  const double weight = batch.token_weights.defined() ? batch.token_weights.max().item<double>() : 1;
  if (bound_of_diagonal(sums) + weight * tokens * largest * largest <= max / 2) {
    return;
  }
  const at::Tensor infinite = where_counted(at::isfinite(inputs).logical_not(), batch.counted);
  TORCH_CHECK_VALUE(!infinite.any().item<bool>(), op, ": expected inputs to be finite, but got ",
                    first_value(inputs, infinite));
  at::Tensor squares = batch.inputs.to(at::kDouble).square();
  if (batch.token_weights.defined()) {
    squares = squares * batch.token_weights.unsqueeze(1);
  }
  constexpr double kRoomForRounding = 0.99;
  const at::Tensor diagonal = squares.sum(0) + diagonal_of(sums);
  if (diagonal.le(kRoomForRounding * max).all().item<bool>()) {
    return;
  }
  const at::Tensor bad = where_counted(inputs.abs().ge(batch.inputs.abs().max()), batch.counted);
  TORCH_CHECK_VALUE(false, op, ": expected inputs whose products keep the sums finite in ", name_of(dtype),
                    dtype == at::kDouble ? "" : " (float64 sums have a larger range)", ", but got ",
                    first_value(inputs, bad));
}

// hessian_update_

HessianPrecision precision_named(const char* op, std::string_view name) {
  return choice_named<HessianPrecision>(op, "precision", name);
}

void hessian_update_(at::Tensor& hessian, const at::Tensor& inputs, const OptionalTensor& token_weights,
                     std::string_view precision) {
  constexpr const char* op = "hessian_update_";
  const PlainOperations plain;
  check_hessian_update_arguments(hessian, inputs, token_weights);
  const HessianPrecision products = precision_named(op, precision);
  check_on_cpu(op, "hessian", hessian);
  check_may_change(op, "hessian", hessian);
  const std::scoped_lock lock(lock_of(hessian));
  const at::Tensor diagonal = hessian.diagonal().to(at::kDouble);
  const at::Tensor bad = at::isfinite(diagonal).logical_not();
  TORCH_CHECK_VALUE(!bad.any().item<bool>(), op, ": expected the diagonal of hessian to be finite, but got ",
                    first_value(diagonal, bad));
  const Batch batch = counted_tokens(op, inputs, {}, token_weights);
  check_batch_values(op, inputs, batch, hessian.unsqueeze(0));
  algorithms::hessian_update(hessian, batch.inputs, batch.token_weights, products);
  count_change(hessian);
}

void meta_hessian_update_(at::Tensor& hessian, const at::Tensor& inputs, const OptionalTensor& token_weights,
                          std::string_view precision) {
  check_hessian_update_arguments(hessian, inputs, token_weights);
  precision_named("hessian_update_", precision);
}

// product_update_

void product_update_(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
  constexpr const char* op = "product_update_";
  const PlainOperations plain;
  check_product_update_arguments(sum, left, right);
  check_on_cpu(op, "sum", sum);
  check_may_change(op, "sum", sum);
  const std::scoped_lock lock(lock_of(sum));
  // factors that share memory with the sum must not change while they are read
  const auto tokens_of = [&](const at::Tensor& factor) {
    return flat_tokens(factor.is_alias_of(sum) ? factor.clone() : factor);
  };
  const at::Tensor x = tokens_of(left);
  const at::Tensor y = tokens_of(right);
  const double bound =
      static_cast<double>(x.size(0)) * algorithms::largest_magnitude(x) * algorithms::largest_magnitude(y);
  if (bound + algorithms::largest_magnitude(sum) <= largest_of(sum.scalar_type()) / 2) {
    algorithms::product_update(sum, x, y);
  } else {
    check_finite(op, "sum", sum);
    check_finite(op, "left", left);
    check_finite(op, "right", right);
    at::Tensor updated = sum.clone();
    algorithms::product_update(updated, x, y);
    const at::Tensor bad = at::isfinite(updated).logical_not();
    TORCH_CHECK_VALUE(!bad.any().item<bool>(), op, ": expected left and right whose products keep sum finite, but got ",
                      first_value(updated, bad));
    sum.copy_(updated);
  }
  count_change(sum);
}

void meta_product_update_(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
  check_product_update_arguments(sum, left, right);
}

// accumulator_*

/// Checks the state of an accumulator; messages put `prefix` before the names of its tensors.
void check_state(const HessianSums& state, const std::string& prefix = "") {
  const at::Tensor& sums = state.sums;
  TORCH_CHECK_VALUE(
      sums.dim() == 3 && (sums.sym_size(0) == 1 || sums.sym_size(0) == 2) && sums.sym_size(1) == sums.sym_size(2),
      kAccumulator, ": expected ", prefix,
      "sums to have shape [1, K, K], or [2, K, K] where halves are kept apart, but got shape ", sums.sym_sizes());
  TORCH_CHECK_TYPE(sums.scalar_type() == at::kFloat || sums.scalar_type() == at::kDouble, kAccumulator, ": expected ",
                   prefix, "sums to be float32 or float64, but got ", name_of(sums.scalar_type()));
  TORCH_CHECK_TYPE(state.tokens.scalar_type() == at::kLong, kAccumulator, ": expected ", prefix,
                   "tokens to be int64, but got ", name_of(state.tokens.scalar_type()));
  TORCH_CHECK_VALUE(state.tokens.dim() == 1 && state.tokens.sym_size(0) == sums.sym_size(0), kAccumulator,
                    ": expected ", prefix, "tokens to have shape [", sums.sym_size(0),
                    "], one for each sum, but got shape ", state.tokens.sym_sizes());
  TORCH_CHECK_TYPE(state.weights.scalar_type() == at::kDouble, kAccumulator, ": expected ", prefix,
                   "weights to be float64, but got ", name_of(state.weights.scalar_type()));
  TORCH_CHECK_VALUE(
      state.weights.dim() == 2 && state.weights.sym_size(0) == 2 && state.weights.sym_size(1) == sums.sym_size(0),
      kAccumulator, ": expected ", prefix, "weights to have shape [2, ", sums.sym_size(0), "], but got shape ",
      state.weights.sym_sizes());
}

void check_update_arguments(const HessianSums& state, const at::Tensor& inputs, const OptionalTensor& mask,
                            const OptionalTensor& token_weights) {
  check_state(state);
  check_inputs_of(kAccumulator, inputs, "the sums", state.sums);
  if (mask.has_value()) {
    TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, kAccumulator,
                     ": expected mask to be bool, true for tokens that count, but got ", name_of(mask->scalar_type()));
    check_of_tokens(kAccumulator, "mask", *mask, inputs);
  }
  check_token_weights(kAccumulator, token_weights, inputs);
}

void check_may_change(const HessianSums& state) {
  check_on_cpu(kAccumulator, "sums", state.sums);
  check_may_change(kAccumulator, "sums", state.sums);
  check_may_change(kAccumulator, "tokens", state.tokens);
  check_may_change(kAccumulator, "weights", state.weights);
}

void count_change(const HessianSums& state) {
  count_change(state.sums);
  count_change(state.tokens);
  count_change(state.weights);
}

void accumulator_update_(at::Tensor& sums, at::Tensor& tokens, at::Tensor& weights, const at::Tensor& inputs,
                         const OptionalTensor& mask, const OptionalTensor& token_weights, std::string_view precision) {
  const PlainOperations plain;
  const HessianSums state{sums, tokens, weights};
  check_update_arguments(state, inputs, mask, token_weights);
  const HessianPrecision products = precision_named(kAccumulator, precision);
  check_may_change(state);
  const Batch batch = counted_tokens(kAccumulator, inputs, mask, token_weights);
  const std::scoped_lock lock(lock_of(sums));
  check_batch_values(kAccumulator, inputs, batch, sums);
  algorithms::accumulate(state, batch.inputs, batch.token_weights, products);
  count_change(state);
}

void meta_accumulator_update_(at::Tensor& sums, at::Tensor& tokens, at::Tensor& weights, const at::Tensor& inputs,
                              const OptionalTensor& mask, const OptionalTensor& token_weights,
                              std::string_view precision) {
  check_update_arguments({sums, tokens, weights}, inputs, mask, token_weights);
  precision_named(kAccumulator, precision);
}

void check_merge_arguments(const HessianSums& state, const HessianSums& other) {
  check_state(state);
  check_state(other, "other ");
  TORCH_CHECK_VALUE(other.sums.sym_sizes() == state.sums.sym_sizes(), kAccumulator,
                    ": expected other sums to have the shape of the sums ", state.sums.sym_sizes(),
                    " (in_features, and halves kept apart or not), but got shape ", other.sums.sym_sizes());
  TORCH_CHECK_TYPE(other.sums.scalar_type() == state.sums.scalar_type(), kAccumulator,
                   ": expected other sums to have the dtype of the sums (", name_of(state.sums.scalar_type()),
                   "), but got ", name_of(other.sums.scalar_type()));
}

void check_merge_values(const HessianSums& state, const HessianSums& other) {
  const auto refuse = [](const char* argument, const char* requirement, const at::Tensor& tensor,
                         const at::Tensor& bad) {
    TORCH_CHECK_VALUE(!bad.any().item<bool>(), kAccumulator, ": expected other ", argument, " to be ", requirement,
                      ", but got ", first_value(tensor, bad));
  };
  if (!algorithms::all_finite(other.sums)) {
    refuse("sums", "finite", other.sums, at::isfinite(other.sums).logical_not());
  }
  refuse("tokens", "not negative", other.tokens, other.tokens < 0);
  refuse("weights", "finite, and positive where there are tokens", other.weights,
         at::isfinite(other.weights).logical_and(other.weights.gt(0).eq(other.tokens.gt(0))).logical_not());
  const at::Tensor diagonal = diagonal_of(state.sums) + diagonal_of(other.sums);
  refuse("sums", "finite when added", diagonal, diagonal.le(largest_of(state.sums.scalar_type())).logical_not());
}

void accumulator_merge_(at::Tensor& sums, at::Tensor& tokens, at::Tensor& weights, const at::Tensor& other_sums,
                        const at::Tensor& other_tokens, const at::Tensor& other_weights) {
  const PlainOperations plain;
  const HessianSums state{sums, tokens, weights};
  const HessianSums other{other_sums, other_tokens, other_weights};
  check_merge_arguments(state, other);
  check_may_change(state);
  std::mutex& mine = lock_of(sums);
  std::mutex& theirs = lock_of(other_sums);
  std::unique_lock first(mine, std::defer_lock);
  std::unique_lock second(theirs, std::defer_lock);
  if (&mine == &theirs) {
    first.lock();
  } else {
    std::lock(first, second);
  }
  check_merge_values(state, other);
  sums.add_(other_sums);
  tokens.add_(other_tokens);
  weights.add_(other_weights);
}

void meta_accumulator_merge_(at::Tensor& sums, at::Tensor& tokens, at::Tensor& weights, const at::Tensor& other_sums,
                             const at::Tensor& other_tokens, const at::Tensor& other_weights) {
  check_merge_arguments({sums, tokens, weights}, {other_sums, other_tokens, other_weights});
}

void check_read_arguments(const HessianSums& state, std::optional<int64_t> half) {
  check_state(state);
  TORCH_CHECK_VALUE(half.value_or(0) == 0 || half.value_or(0) == 1, kAccumulator,
                    ": expected half to be 0 or 1, but got ", half.value_or(0));
  TORCH_CHECK_VALUE(!half.has_value() || state.sums.sym_size(0) == 2, kAccumulator,
                    ": expected halves that are kept apart (halves=True; Halves::kApart in C++), but they are not");
}

/// The value for one half, or for all tokens.
at::Tensor part_of(const at::Tensor& per_sum, std::optional<int64_t> half) {
  return half.has_value() ? per_sum.select(-1, *half) : per_sum.sum(-1);
}

at::Tensor accumulator_hessian(const at::Tensor& sums, const at::Tensor& tokens, const at::Tensor& weights,
                               std::optional<int64_t> half) {
  const PlainOperations plain;
  const HessianSums state{sums, tokens, weights};
  check_read_arguments(state, half);
  const std::scoped_lock lock(lock_of(sums));
  const auto all_tokens = tokens.sum().item<int64_t>();
  if (half.has_value()) {
    TORCH_CHECK_VALUE(tokens[*half].item<int64_t>() > 0, kAccumulator,
                      ": expected at least one token in each half, but got ", all_tokens, " in total");
  } else {
    TORCH_CHECK_VALUE(all_tokens > 0, kAccumulator, ": expected at least one token before hessian(), but got none");
  }
  at::Tensor hessian = algorithms::empty_in_large_pages({sums.size(1), sums.size(2)}, sums.scalar_type());
  if (half.has_value() || sums.size(0) == 1) {
    hessian.copy_(sums.select(0, half.value_or(0)));
  } else {
    at::add_out(hessian, sums.select(0, 0), sums.select(0, 1));
  }
  return hessian.div_(part_of(weights[0], half).item<double>());
}

at::Tensor meta_accumulator_hessian(const at::Tensor& sums, const at::Tensor& tokens, const at::Tensor& weights,
                                    std::optional<int64_t> half) {
  check_read_arguments({sums, tokens, weights}, half);
  return at::empty_symint({sums.sym_size(1), sums.sym_size(2)}, sums.options());
}

std::tuple<at::Tensor, at::Tensor> accumulator_tokens(const at::Tensor& sums, const at::Tensor& tokens,
                                                      const at::Tensor& weights, std::optional<int64_t> half) {
  const PlainOperations plain;
  check_read_arguments({sums, tokens, weights}, half);
  const std::scoped_lock lock(lock_of(sums));
  const at::Tensor weight = part_of(weights[0], half);
  const at::Tensor squares = part_of(weights[1], half);
  return {part_of(tokens, half).clone(), (weight * weight / squares).masked_fill_(squares.eq(0), 0)};
}

std::tuple<at::Tensor, at::Tensor> meta_accumulator_tokens(const at::Tensor& sums, const at::Tensor& tokens,
                                                           const at::Tensor& weights, std::optional<int64_t> half) {
  check_read_arguments({sums, tokens, weights}, half);
  return {at::empty({}, tokens.options()), at::empty({}, weights.options())};
}

void implement_accumulator(torch::Library& m) {
  m.impl("hessian_update_", hessian_update_);
  m.impl("product_update_", product_update_);
  m.impl("accumulator_update_", accumulator_update_);
  m.impl("accumulator_merge_", accumulator_merge_);
  m.impl("accumulator_hessian", accumulator_hessian);
  m.impl("accumulator_tokens", accumulator_tokens);
}

}  // namespace
}  // namespace miniquant::ops

// As in cpu.cpp: the operator itself rejects what it does not support.
TORCH_LIBRARY_IMPL(miniquant, CompositeExplicitAutograd, m) { miniquant::ops::implement_accumulator(m); }
TORCH_LIBRARY_IMPL(miniquant, NestedTensorCPU, m) { miniquant::ops::implement_accumulator(m); }

TORCH_LIBRARY_IMPL(miniquant, Meta, m) {
  m.impl("hessian_update_", miniquant::ops::meta_hessian_update_);
  m.impl("product_update_", miniquant::ops::meta_product_update_);
  m.impl("accumulator_update_", miniquant::ops::meta_accumulator_update_);
  m.impl("accumulator_merge_", miniquant::ops::meta_accumulator_merge_);
  m.impl("accumulator_hessian", miniquant::ops::meta_accumulator_hessian);
  m.impl("accumulator_tokens", miniquant::ops::meta_accumulator_tokens);
}
