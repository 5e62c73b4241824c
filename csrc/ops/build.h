#pragma once

#include <string_view>

// What can be asked of the library itself, as miniquant/build.h documents it.

namespace miniquant::ops {

std::string_view version();
std::string_view instruction_set();

}  // namespace miniquant::ops
