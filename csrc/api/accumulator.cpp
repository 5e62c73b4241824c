#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "miniquant/hessian.h"

namespace miniquant {

HessianAccumulator::HessianAccumulator(int64_t in_features, at::ScalarType dtype, Halves halves) {
  TORCH_CHECK_VALUE(in_features >= 0, "HessianAccumulator: expected in_features to be at least 0, but got ",
                    in_features);
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble,
                   "HessianAccumulator: expected dtype to be float32 or float64, but got ",
                   c10::getDtypeNames(dtype).first);
  sum_[0] = at::zeros({in_features, in_features}, at::TensorOptions().dtype(dtype));
  if (halves == Halves::kApart) {
    sum_[1] = at::zeros_like(sum_[0]);
  }
}

void HessianAccumulator::update(const at::Tensor& inputs) {
  const bool apart = sum_[1].defined();
  if (!apart || inputs.numel() == 0 || inputs.dim() == 0 || inputs.size(-1) != sum_[0].size(0)) {
    add(0, inputs);  // which refuses what has the wrong shape
    return;
  }
  const at::Tensor batch = inputs.reshape({-1, inputs.size(-1)});
  const int64_t lighter = tokens_[0] <= tokens_[1] ? 0 : 1;
  if (batch.size(0) <= tokens()) {
    add(lighter, batch);
    return;
  }
  // Both halves have as many tokens afterwards, to one.
  const int64_t missing = tokens_[1 - lighter] - tokens_[lighter];
  const int64_t cut = (batch.size(0) + missing + 1) / 2;
  add(lighter, batch.narrow(0, 0, cut));
  add(1 - lighter, batch.narrow(0, cut, batch.size(0) - cut));
}

void HessianAccumulator::add(int64_t index, const at::Tensor& inputs) {
  hessian_update_(sum_[index], inputs);
  int64_t batch_tokens = 1;
  for (int64_t dim = 0; dim + 1 < inputs.dim(); ++dim) {
    batch_tokens *= inputs.size(dim);
  }
  tokens_[index] += batch_tokens;
}

at::Tensor HessianAccumulator::hessian() const {
  TORCH_CHECK_VALUE(tokens() > 0, "HessianAccumulator: expected at least one token before hessian(), but got none");
  return (sum_[1].defined() ? sum_[0] + sum_[1] : sum_[0]) / tokens();
}

at::Tensor HessianAccumulator::half(int64_t index) const {
  TORCH_CHECK_VALUE(half_tokens(index) > 0, "HessianAccumulator: expected at least one token in either half, but got ",
                    tokens(), " in all");
  return sum_[index] / tokens_[index];
}

int64_t HessianAccumulator::half_tokens(int64_t index) const {
  TORCH_CHECK_VALUE(index == 0 || index == 1, "HessianAccumulator: expected half to be 0 or 1, but got ", index);
  TORCH_CHECK_VALUE(sum_[1].defined(),
                    "HessianAccumulator: expected halves that are kept apart (Halves::kApart), but they are not");
  return tokens_[index];
}

}  // namespace miniquant
