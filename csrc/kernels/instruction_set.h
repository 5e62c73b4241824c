#pragma once

#include <cstdint>

namespace miniquant::kernels {

/// The instruction sets the kernels are compiled for, weakest first.
enum class InstructionSet : std::uint8_t { kBaseline, kAvx2, kAvx512 };

/// "baseline", "avx2" or "avx512": also what MINIQUANT_ISA accepts.
const char* name(InstructionSet instruction_set);

/// Whether this build has kernels for it and this CPU can run them.
bool is_supported(InstructionSet instruction_set);

/// The strongest supported one, or the one that the environment variable MINIQUANT_ISA names. Throws
/// std::invalid_argument where that names none or one that is not supported here.
InstructionSet choose_instruction_set();

}  // namespace miniquant::kernels
