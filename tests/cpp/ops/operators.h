#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <miniquant/gptq.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

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

/// The results of an operator called through the dispatcher with its arguments in order, then options by name. Options
/// that are not named take the schema's defaults.
inline std::vector<c10::IValue> call_operator(const char* name, std::vector<c10::IValue> arguments,
                                              const std::map<std::string, c10::IValue>& options = {}) {
  const c10::OperatorHandle op = find_operator(name);
  for (size_t i = arguments.size(); i < op.schema().arguments().size(); ++i) {
    const c10::Argument& argument = op.schema().arguments()[i];
    const auto found = options.find(argument.name());
    arguments.push_back(found != options.end() ? found->second : argument.default_value().value());
  }
  op.callBoxed(&arguments);
  return arguments;
}

/// Calls gptq or gptq_reference through the dispatcher, with the names of its choices.
inline GptqResult call_gptq(const char* name, const at::Tensor& weight, const at::Tensor& hessian,
                            std::string_view group_scales, std::string_view column_order,
                            const GptqOptions& options = {}) {
  const std::vector<c10::IValue> results = call_operator(name, {weight, hessian},
                                                         {{"bits", options.bits},
                                                          {"group_size", options.group_size},
                                                          {"symmetric", options.symmetric},
                                                          {"ridge", options.ridge},
                                                          {"block_size", options.block_size},
                                                          {"group_scales", std::string(group_scales)},
                                                          {"column_order", std::string(column_order)},
                                                          {"scales", options.scales},
                                                          {"zero_points", options.zero_points},
                                                          {"full_range", options.full_range},
                                                          {"scale_dtype", options.scale_dtype},
                                                          {"refine", options.refine},
                                                          {"beam_scales", options.beam_scales}});
  const QuantizationGrid& kind = options;
  return {{kind, results[0].toTensor(), results[1].toTensor(), results[2].toTensor()}, results[3].toTensor()};
}

}  // namespace miniquant::testing
