#include "kernels/kernels.h"

#include <stdexcept>
#include <string>

namespace miniquant::kernels {

extern const KernelTable kernel_table_baseline;
#if defined(__x86_64__)
extern const KernelTable kernel_table_avx2;
extern const KernelTable kernel_table_avx512;
#endif

const KernelTable& kernels_for(InstructionSet instruction_set) {
  if (!is_supported(instruction_set)) {
    throw std::invalid_argument(std::string("kernels_for: expected a supported instruction set, but got '") +
                                name(instruction_set) + "'");
  }
  switch (instruction_set) {
#if defined(__x86_64__)
    case InstructionSet::kAvx512:
      return kernel_table_avx512;
    case InstructionSet::kAvx2:
      return kernel_table_avx2;
#endif
    default:
      return kernel_table_baseline;
  }
}

const KernelTable& kernels() {
  static const KernelTable& chosen = kernels_for(choose_instruction_set());
  return chosen;
}

}  // namespace miniquant::kernels
