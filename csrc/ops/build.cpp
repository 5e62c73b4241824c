#include "ops/build.h"

#include "kernels/bf16.h"
#include "kernels/instruction_set.h"
#include "kernels/kernels.h"

namespace miniquant::ops {

std::string_view version() { return MINIQUANT_VERSION; }

// Read from the chosen table: the environment may have changed since the choice.
std::string_view instruction_set() { return kernels::name(kernels::kernels().instruction_set); }

std::string_view bfloat16_unit() { return kernels::name(kernels::bf16_unit()); }

}  // namespace miniquant::ops
