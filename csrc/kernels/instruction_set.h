#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

#include "kernels/instruction_sets.h"

namespace miniquant::kernels {

/// The instruction sets that the kernels are compiled for, weakest first: kBaseline and, on x86-64, kAvx2 and kAvx512.
enum class InstructionSet : std::uint8_t {
#define MINIQUANT_ENUMERATOR(name, enumerator, supported) enumerator,
  MINIQUANT_FOR_EACH_INSTRUCTION_SET(MINIQUANT_ENUMERATOR)
#undef MINIQUANT_ENUMERATOR
};

/// All of them.
inline constexpr std::array kInstructionSets = {
#define MINIQUANT_ELEMENT(name, enumerator, supported) InstructionSet::enumerator,
    MINIQUANT_FOR_EACH_INSTRUCTION_SET(MINIQUANT_ELEMENT)
#undef MINIQUANT_ELEMENT
};

/// "baseline", "avx2" or "avx512": the names that MINIQUANT_ISA takes.
const char* name(InstructionSet instruction_set);

/// The instruction set of that name; nullopt if this build has no kernels for it.
std::optional<InstructionSet> instruction_set_named(std::string_view wanted);

/// Whether this build has kernels for it and this CPU can run them.
bool is_supported(InstructionSet instruction_set);

/// The strongest supported instruction set, or the one that the environment variable MINIQUANT_ISA names. Throws
/// std::invalid_argument where MINIQUANT_ISA names one that is unknown or not supported here.
InstructionSet choose_instruction_set();

}  // namespace miniquant::kernels
