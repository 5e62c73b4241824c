#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

#include "kernels/instruction_sets.h"

namespace miniquant::kernels {

/// The instruction sets that the kernels are compiled for, weakest first: kBaseline and, on x86-64, kAvx2 and kAvx512,
/// on 64-bit ARM kNeon.
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

/// Units of a CPU that multiply bfloat16 values and sum in float32, weakest first: kNone and, with a compiler that
/// knows them, kAvx512Bf16 and kAmxBf16 on x86-64, kNeonBf16 on 64-bit ARM. The kernels of kernels/bf16.h use one; all
/// others use an instruction set.
enum class Bf16Unit : std::uint8_t {
  kNone,
#define MINIQUANT_ENUMERATOR(name, enumerator, supported, preferred) enumerator,
  MINIQUANT_FOR_EACH_BF16_UNIT(MINIQUANT_ENUMERATOR)
#undef MINIQUANT_ENUMERATOR
};

/// All of them.
inline constexpr std::array kBf16Units = {Bf16Unit::kNone,
#define MINIQUANT_ELEMENT(name, enumerator, supported, preferred) Bf16Unit::enumerator,
                                          MINIQUANT_FOR_EACH_BF16_UNIT(MINIQUANT_ELEMENT)
#undef MINIQUANT_ELEMENT
};

/// "baseline", "avx2", "avx512" or "neon": names that MINIQUANT_ISA takes.
const char* name(InstructionSet instruction_set);

/// "none", "avx512_bf16", "amx_bf16" or "neon_bf16"; MINIQUANT_ISA takes all but "none".
const char* name(Bf16Unit unit);

/// The instruction set of that name; nullopt if this build has no kernels for it.
std::optional<InstructionSet> instruction_set_named(std::string_view wanted);

/// Whether this build has kernels for it and this CPU can run them.
bool is_supported(InstructionSet instruction_set);

/// Whether this build has kernels for it, this CPU can run them and the operating system permits it. The permission is
/// for the process, and the first call asks for it.
bool is_supported(Bf16Unit unit);

/// The strongest supported instruction set, or the one that the environment variable MINIQUANT_ISA names. Where that
/// names a unit, the strongest. Throws std::invalid_argument where it names something unknown or not supported here.
InstructionSet choose_instruction_set();

/// The strongest supported unit that multiplies faster than the instruction sets, or the one that MINIQUANT_ISA names;
/// kNone where that names an instruction set. Throws as choose_instruction_set().
Bf16Unit choose_bf16_unit();

}  // namespace miniquant::kernels
