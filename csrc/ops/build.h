#pragma once

#include <string_view>

// The version and the instruction set and unit of the library, as miniquant/build.h documents them.

namespace miniquant::ops {

std::string_view version();
std::string_view instruction_set();
std::string_view bfloat16_unit();

}  // namespace miniquant::ops
