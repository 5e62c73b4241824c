#include "kernels/kernels.h"

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>

namespace miniquant::kernels {

// kernels_isa.cpp, compiled for each instruction set, defines one table each.
#define MINIQUANT_DECLARE_TABLE(name, enumerator, supported) extern const KernelTable kernel_table_##name;
MINIQUANT_FOR_EACH_INSTRUCTION_SET(MINIQUANT_DECLARE_TABLE)
#undef MINIQUANT_DECLARE_TABLE

namespace {

constexpr std::array kTables = {
#define MINIQUANT_TABLE(name, enumerator, supported) &kernel_table_##name,
    MINIQUANT_FOR_EACH_INSTRUCTION_SET(MINIQUANT_TABLE)
#undef MINIQUANT_TABLE
};

}  // namespace

const KernelTable& kernels_for(InstructionSet instruction_set) {
  if (!is_supported(instruction_set)) {
    throw std::invalid_argument(std::string("kernels_for: expected a supported instruction set, but got '") +
                                name(instruction_set) + "'");
  }
  return *kTables.at(static_cast<std::size_t>(instruction_set));
}

const KernelTable& kernels() {
  static const KernelTable& chosen = kernels_for(choose_instruction_set());
  return chosen;
}

}  // namespace miniquant::kernels
