#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <miniquant/gptq.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace miniquant::testing {

/// The C++ functions that take the arguments of gptq.
struct NamedAlgorithm {
  const char* name;
  GptqResult (*run)(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options);
};
inline constexpr NamedAlgorithm kForms[] = {{"gptq", gptq}, {"gptq_reference", gptq_reference}};

inline c10::OperatorHandle find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow((std::string("miniquant::") + name).c_str(), "");
}

/// gptq or gptq_reference through the dispatcher, with the texts of its choices.
inline GptqResult call_gptq(const char* name, const at::Tensor& weight, const at::Tensor& hessian,
                            std::string_view group_scales, std::string_view column_order,
                            const GptqOptions& options = {}) {
  using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  using OptionalTensor = const std::optional<at::Tensor>&;
  const auto op =
      find_operator(name)
          .typed<Result(const at::Tensor&, const at::Tensor&, int64_t, int64_t, bool, double, int64_t, std::string_view,
                        std::string_view, OptionalTensor, OptionalTensor, bool, std::string_view, int64_t, int64_t)>();
  auto [codes, scales, zero_points, row_loss] =
      op.call(weight, hessian, options.bits, options.group_size, options.symmetric, options.ridge, options.block_size,
              group_scales, column_order, options.scales, options.zero_points, options.full_range, "absmax",
              options.refine, options.beam_scales);
  return {{codes, scales, zero_points}, row_loss};
}

}  // namespace miniquant::testing
