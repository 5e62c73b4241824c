#include "miniquant/build.h"

#include "ops/build.h"

namespace miniquant {

std::string_view version() { return ops::version(); }

std::string_view instruction_set() { return ops::instruction_set(); }

std::string_view bfloat16_unit() { return ops::bfloat16_unit(); }

}  // namespace miniquant
