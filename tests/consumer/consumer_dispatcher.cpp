// Calls the operator by its name alone: no header and no symbol of miniquant. The library is there because the CMake
// package keeps it linked. Prints the checksum of the codes.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <cstdio>

#include "problem.h"

int main() {
  const auto gptq = c10::Dispatcher::singleton().findSchemaOrThrow("miniquant::gptq", "");
  torch::jit::Stack stack;
  torch::jit::push(stack, problem_weight(), problem_hessian());
  gptq.schema().checkAndNormalizeInputs(stack, {{"group_size", 32}});  // the schema knows all other defaults
  gptq.callBoxed(stack);
  std::printf("codes_checksum %lld\n", static_cast<long long>(codes_checksum(stack.at(0).toTensor())));
  return 0;
}
