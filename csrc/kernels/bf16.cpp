#include "kernels/bf16.h"

#include <stdexcept>
#include <string>

namespace miniquant::kernels {

// bf16_isa.cpp, compiled for each unit, defines one table each.
#define MINIQUANT_DECLARE_TABLE(name, enumerator, supported, preferred) extern const Bf16Kernels bf16_kernels_##name;
MINIQUANT_FOR_EACH_BF16_UNIT(MINIQUANT_DECLARE_TABLE)
#undef MINIQUANT_DECLARE_TABLE

const Bf16Kernels& bf16_kernels_for(Bf16Unit unit) {
  if (is_supported(unit)) {
    switch (unit) {
#define MINIQUANT_TABLE(name, enumerator, supported, preferred) \
  case Bf16Unit::enumerator:                                    \
    return bf16_kernels_##name;
      MINIQUANT_FOR_EACH_BF16_UNIT(MINIQUANT_TABLE)
#undef MINIQUANT_TABLE
      case Bf16Unit::kNone:
        break;
    }
  }
  throw std::invalid_argument(std::string("bf16_kernels_for: expected a supported unit, but got '") + name(unit) + "'");
}

Bf16Unit bf16_unit() {
  static const Bf16Unit chosen = choose_bf16_unit();
  return chosen;
}

const Bf16Kernels* bf16_kernels() {
  static const Bf16Kernels* const chosen = bf16_unit() == Bf16Unit::kNone ? nullptr : &bf16_kernels_for(bf16_unit());
  return chosen;
}

}  // namespace miniquant::kernels
