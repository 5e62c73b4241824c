#include "kernels/instruction_set.h"

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace miniquant::kernels {
namespace {

constexpr std::array kWeakestFirst = {InstructionSet::kBaseline, InstructionSet::kAvx2, InstructionSet::kAvx512};

std::string supported_names() {
  std::string names;
  for (const InstructionSet candidate : kWeakestFirst) {
    if (is_supported(candidate)) {
      names += (names.empty() ? "" : ", ") + std::string(name(candidate));
    }
  }
  return names;
}

}  // namespace

const char* name(InstructionSet instruction_set) {
  switch (instruction_set) {
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kBaseline:
      return "baseline";
  }
  return "unknown";
}

bool is_supported(InstructionSet instruction_set) {
#if defined(__x86_64__)
  switch (instruction_set) {
    case InstructionSet::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
    case InstructionSet::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case InstructionSet::kBaseline:
      return true;
  }
  return false;
#else
  return instruction_set == InstructionSet::kBaseline;
#endif
}

InstructionSet choose_instruction_set() {
  if (const char* forced = std::getenv("MINIQUANT_ISA"); forced != nullptr && *forced != '\0') {
    for (const InstructionSet candidate : kWeakestFirst) {
      if (std::string(forced) == name(candidate) && is_supported(candidate)) {
        return candidate;
      }
    }
    throw std::invalid_argument("MINIQUANT_ISA: expected one of the instruction sets supported here (" +
                                supported_names() + "), but got '" + forced + "'");
  }
  InstructionSet strongest = InstructionSet::kBaseline;
  for (const InstructionSet candidate : kWeakestFirst) {
    if (is_supported(candidate)) {
      strongest = candidate;
    }
  }
  return strongest;
}

}  // namespace miniquant::kernels
