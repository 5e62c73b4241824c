// consumer_aoti PACKAGE.pt2
//
// Loads an AOTInductor package of a module whose forward(weight, hessian) returns codes, or a tuple that starts with
// them; runs it on the inputs of problem.h and prints the checksum of the codes.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>

#include "problem.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s PACKAGE.pt2\n", argv[0]);
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  const std::vector<at::Tensor> outputs = loader.run({problem_weight(), problem_hessian()});
  std::printf("codes_checksum %lld\n", static_cast<long long>(codes_checksum(outputs.at(0))));
  return 0;
}
