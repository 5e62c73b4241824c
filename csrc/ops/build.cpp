#include "ops/build.h"

#include <c10/util/Exception.h>

#include "kernels/instruction_set.h"
#include "kernels/kernels.h"

namespace miniquant::ops {

std::string_view version() { return MINIQUANT_VERSION; }

std::string_view instruction_set() {
  // The table that was chosen says it, whatever the environment says now.
  using kernels::InstructionSet;
  for (const auto candidate : {InstructionSet::kBaseline, InstructionSet::kAvx2, InstructionSet::kAvx512}) {
    if (kernels::is_supported(candidate) && &kernels::kernels_for(candidate) == &kernels::kernels()) {
      return kernels::name(candidate);
    }
  }
  TORCH_INTERNAL_ASSERT(false, "the kernels are those of no instruction set");
}

}  // namespace miniquant::ops
