#pragma once

#include <miniquant/export.h>

#include <string_view>

namespace miniquant {

/// The library's version, "major.minor.patch".
MINIQUANT_API std::string_view version();

/// The instruction set whose kernels run in this process: "baseline", "avx2" or "avx512". The strongest one that the
/// CPU supports, or the one that the environment variable MINIQUANT_ISA names when the first kernel is chosen. Throws
/// std::invalid_argument where MINIQUANT_ISA names none that is supported.
MINIQUANT_API std::string_view instruction_set();

}  // namespace miniquant
