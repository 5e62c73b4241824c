#include "miniquant/ridge.h"

#include <ATen/TensorOperators.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <utility>

#include "algorithms/ridge.h"
#include "ops/find_operator.h"
#include "ops/results.h"

namespace miniquant {
namespace {

std::vector<double> to_vector(const at::Tensor& values) {
  const auto* const first = values.const_data_ptr<double>();
  return {first, first + values.numel()};
}

}  // namespace

RidgeChoice choose_ridge(const at::Tensor& weight, const HessianAccumulator& accumulator, const GridOptions& grid) {
  using Signature =
      ops::RidgeTuple(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t, int64_t, bool);
  static const auto op = ops::find_operator<Signature>("miniquant::choose_ridge");
  TORCH_CHECK_VALUE(!grid.scales.has_value(), "choose_ridge: expected no scales, but got scales of shape ",
                    grid.scales->sizes());
  const auto [ridge, ridges, losses, fallbacks] =
      op.call(weight, accumulator.half(0), accumulator.half(1), std::lround(accumulator.effective_tokens()), grid.bits,
              grid.group_size, grid.symmetric);
  const at::Tensor tried = losses != algorithms::kNotTried;
  const at::Tensor nearest = losses.select(0, -1);
  return {ridge.item<double>(), to_vector(ridges.masked_select(tried)),
          to_vector((losses / nearest.masked_fill(nearest == 0, 1)).masked_select(tried)), to_vector(fallbacks)};
}

AutoGptqResult gptq_auto(const at::Tensor& weight, const HessianAccumulator& accumulator, const GptqOptions& options) {
  AutoGptqResult result;
  GridOptions judged;
  judged.bits = options.bits;
  judged.group_size = options.group_size;
  judged.symmetric = options.symmetric;
  result.choice = choose_ridge(weight, accumulator, judged);
  GptqOptions with_ridge = options;
  with_ridge.ridge = result.choice.ridge;
  const at::Tensor hessian = accumulator.hessian();
  for (const double fallback : result.choice.fallbacks) {
    try {
      static_cast<GptqResult&>(result) = gptq(weight, hessian, with_ridge);
      result.ridge = with_ridge.ridge;
      return result;
    } catch (const c10::LinAlgError&) {
      result.failed.push_back(with_ridge.ridge);
      with_ridge.ridge = fallback;
    }
  }
  static_cast<GptqResult&>(result) = gptq(weight, hessian, with_ridge);
  result.ridge = with_ridge.ridge;
  return result;
}

}  // namespace miniquant
