#include "miniquant/build.h"

#include "ops/build.h"

namespace miniquant {

std::string_view version() { return ops::version(); }

std::string_view instruction_set() { return ops::instruction_set(); }

}  // namespace miniquant
