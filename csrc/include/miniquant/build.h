#pragma once

#include <miniquant/export.h>

#include <string_view>

namespace miniquant {

/// The version of the library, "major.minor.patch".
MINIQUANT_API std::string_view version();

/// The instruction set whose kernels run in this process: "baseline", "avx2", "avx512" or "neon". The strongest that
/// the CPU supports, unless the environment variable MINIQUANT_ISA names another when the first kernel is chosen.
/// Throws std::invalid_argument where MINIQUANT_ISA names an instruction set or unit that is unknown or not supported.
MINIQUANT_API std::string_view instruction_set();

/// The unit that computes Hessians of bfloat16 and float16 inputs in float32: "amx_bf16", "avx512_bf16", "neon_bf16"
/// or "none", where the kernels of instruction_set() do. The strongest that the CPU and the operating system support
/// and that multiplies faster than float32 (avx512_bf16 does not on CPUs of Intel). MINIQUANT_ISA may name one; where
/// it names an instruction set there is none. Throws as instruction_set().
///
/// A unit multiplies exactly and sums in float32, so the sums differ from those without it by rounding only.
MINIQUANT_API std::string_view bfloat16_unit();

}  // namespace miniquant
