#include "ops/build.h"

#include "kernels/instruction_set.h"
#include "kernels/kernels.h"

namespace miniquant::ops {

std::string_view version() { return MINIQUANT_VERSION; }

// The table that was chosen says it, whatever the environment says now.
std::string_view instruction_set() { return kernels::name(kernels::kernels().instruction_set); }

}  // namespace miniquant::ops
