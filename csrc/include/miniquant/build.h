#pragma once

#include <miniquant/export.h>

#include <string_view>

namespace miniquant {

/// The version of the library, "major.minor.patch".
MINIQUANT_API std::string_view version();

/// The instruction set whose kernels run in this process: "baseline", "avx2" or "avx512". The strongest that the CPU
/// supports, unless the environment variable MINIQUANT_ISA names another when the first kernel is chosen. Throws
/// std::invalid_argument where MINIQUANT_ISA names an instruction set that is unknown or not supported.
MINIQUANT_API std::string_view instruction_set();

}  // namespace miniquant
