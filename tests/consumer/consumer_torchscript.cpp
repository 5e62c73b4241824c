// consumer_torchscript MODEL.pt
//
// Loads a TorchScript module whose forward(weight, hessian) returns codes, or a tuple that starts with them; runs it on
// the inputs of problem.h and prints the checksum of the codes.

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>

#include <cstdio>

#include "problem.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s MODEL.pt\n", argv[0]);
    return 2;
  }
  torch::jit::Module module = torch::jit::load(argv[1]);
  const c10::IValue output = module.forward({problem_weight(), problem_hessian()});
  const at::Tensor codes = output.isTuple() ? output.toTuple()->elements().at(0).toTensor() : output.toTensor();
  std::printf("codes_checksum %lld\n", static_cast<long long>(codes_checksum(codes)));
  return 0;
}
