#include "kernels/instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace miniquant::kernels {
namespace {

std::string supported_names() {
  std::string names;
  for (const InstructionSet candidate : kInstructionSets) {
    if (is_supported(candidate)) {
      names += (names.empty() ? "" : ", ") + std::string(name(candidate));
    }
  }
  return names;
}

}  // namespace

const char* name(InstructionSet instruction_set) {
  switch (instruction_set) {
#define MINIQUANT_NAME(name, enumerator, supported) \
  case InstructionSet::enumerator:                  \
    return #name;
    MINIQUANT_FOR_EACH_INSTRUCTION_SET(MINIQUANT_NAME)
#undef MINIQUANT_NAME
  }
  return "unknown";
}

std::optional<InstructionSet> instruction_set_named(std::string_view wanted) {
  for (const InstructionSet candidate : kInstructionSets) {
    if (wanted == name(candidate)) {
      return candidate;
    }
  }
  return std::nullopt;
}

bool is_supported(InstructionSet instruction_set) {
  switch (instruction_set) {
#define MINIQUANT_SUPPORTED(name, enumerator, supported) \
  case InstructionSet::enumerator:                       \
    return supported;
    MINIQUANT_FOR_EACH_INSTRUCTION_SET(MINIQUANT_SUPPORTED)
#undef MINIQUANT_SUPPORTED
  }
  return false;
}

InstructionSet choose_instruction_set() {
  if (const char* forced = std::getenv("MINIQUANT_ISA"); forced != nullptr && *forced != '\0') {
    const std::optional<InstructionSet> named = instruction_set_named(forced);
    if (!named.has_value() || !is_supported(*named)) {
      throw std::invalid_argument("MINIQUANT_ISA: expected one of the instruction sets supported here (" +
                                  supported_names() + "), but got '" + forced + "'");
    }
    return *named;
  }
  InstructionSet strongest = kInstructionSets.front();
  for (const InstructionSet candidate : kInstructionSets) {
    if (is_supported(candidate)) {
      strongest = candidate;
    }
  }
  return strongest;
}

}  // namespace miniquant::kernels
