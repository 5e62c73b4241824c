// Calls the operator by its name alone: no header and no symbol of miniquant. The library is there because the CMake
// package keeps it linked. Prints the checksum of the codes.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <cstdio>
#include <optional>

#include "problem.h"

int main() {
  const auto gptq = c10::Dispatcher::singleton().findSchemaOrThrow("miniquant::gptq", "");
  torch::jit::Stack stack;
  torch::jit::push(stack, problem_weight(), problem_hessian(), /*bits=*/4, /*group_size=*/32, /*symmetric=*/true,
                   /*ridge=*/0.01, /*block_size=*/128, /*group_scales=*/"static", /*column_order=*/"natural",
                   /*scales=*/c10::IValue(), /*zero_points=*/c10::IValue());
  gptq.callBoxed(stack);
  std::printf("codes_checksum %lld\n", static_cast<long long>(codes_checksum(stack.at(0).toTensor())));
  return 0;
}
