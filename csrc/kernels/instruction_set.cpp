#include "kernels/instruction_set.h"

#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace miniquant::kernels {
namespace {

/// Whether the operating system lets this process use AMX tiles. Linux saves their registers only for processes that
/// asked for it.
[[maybe_unused]] bool tiles_permitted() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

/// Whether an ARM CPU has the instructions of BF16.
[[maybe_unused]] bool has_bf16_of_arm() {
#if defined(__linux__) && defined(__aarch64__)
  constexpr unsigned long kBf16 = 1UL << 14U;  // HWCAP2_BF16
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  std::size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}

/// Whether the unit is chosen where MINIQUANT_ISA names nothing: it multiplies faster than the instruction sets.
bool is_preferred(Bf16Unit unit) {
  switch (unit) {
    case Bf16Unit::kNone:
      return true;
#define MINIQUANT_PREFERRED(name, enumerator, supported, preferred) \
  case Bf16Unit::enumerator:                                        \
    return preferred;
      MINIQUANT_FOR_EACH_BF16_UNIT(MINIQUANT_PREFERRED)
#undef MINIQUANT_PREFERRED
  }
  return false;
}

InstructionSet strongest_instruction_set() {
  InstructionSet strongest = kInstructionSets.front();
  for (const InstructionSet candidate : kInstructionSets) {
    if (is_supported(candidate)) {
      strongest = candidate;
    }
  }
  return strongest;
}

Bf16Unit strongest_unit() {
  Bf16Unit strongest = Bf16Unit::kNone;
  for (const Bf16Unit candidate : kBf16Units) {
    if (is_preferred(candidate) && is_supported(candidate)) {
      strongest = candidate;
    }
  }
  return strongest;
}

std::string supported_names() {
  std::string names;
  for (const InstructionSet candidate : kInstructionSets) {
    if (is_supported(candidate)) {
      names += (names.empty() ? "" : ", ") + std::string(name(candidate));
    }
  }
  for (const Bf16Unit candidate : kBf16Units) {
    if (candidate != Bf16Unit::kNone && is_supported(candidate)) {
      names += ", " + std::string(name(candidate));
    }
  }
  return names;
}

struct Choice {
  InstructionSet instruction_set;
  Bf16Unit bf16_unit;
};

Choice choose() {
  const char* const forced = std::getenv("MINIQUANT_ISA");
  if (forced == nullptr || *forced == '\0') {
    return {strongest_instruction_set(), strongest_unit()};
  }
  if (const std::optional<InstructionSet> named = instruction_set_named(forced);
      named.has_value() && is_supported(*named)) {
    return {*named, Bf16Unit::kNone};
  }
  for (const Bf16Unit candidate : kBf16Units) {
    if (candidate != Bf16Unit::kNone && std::string_view(forced) == name(candidate) && is_supported(candidate)) {
      return {strongest_instruction_set(), candidate};
    }
  }
  throw std::invalid_argument("MINIQUANT_ISA: expected one of the instruction sets supported here (" +
                              supported_names() + "), but got '" + forced + "'");
}

}  // namespace

const char* name(InstructionSet instruction_set) {
  switch (instruction_set) {
#define MINIQUANT_NAME(name, enumerator, supported) \
  case InstructionSet::enumerator:                  \
    return #name;
    MINIQUANT_FOR_EACH_INSTRUCTION_SET(MINIQUANT_NAME)
#undef MINIQUANT_NAME
  }
  return "unknown";
}

const char* name(Bf16Unit unit) {
  switch (unit) {
    case Bf16Unit::kNone:
      return "none";
#define MINIQUANT_NAME(name, enumerator, supported, preferred) \
  case Bf16Unit::enumerator:                                   \
    return #name;
      MINIQUANT_FOR_EACH_BF16_UNIT(MINIQUANT_NAME)
#undef MINIQUANT_NAME
  }
  return "unknown";
}

std::optional<InstructionSet> instruction_set_named(std::string_view wanted) {
  for (const InstructionSet candidate : kInstructionSets) {
    if (wanted == name(candidate)) {
      return candidate;
    }
  }
  return std::nullopt;
}

bool is_supported(InstructionSet instruction_set) {
  switch (instruction_set) {
#define MINIQUANT_SUPPORTED(name, enumerator, supported) \
  case InstructionSet::enumerator:                       \
    return supported;
    MINIQUANT_FOR_EACH_INSTRUCTION_SET(MINIQUANT_SUPPORTED)
#undef MINIQUANT_SUPPORTED
  }
  return false;
}

bool is_supported(Bf16Unit unit) {
  switch (unit) {
    case Bf16Unit::kNone:
      return true;
#define MINIQUANT_SUPPORTED(name, enumerator, supported, preferred) \
  case Bf16Unit::enumerator:                                        \
    return supported;
      MINIQUANT_FOR_EACH_BF16_UNIT(MINIQUANT_SUPPORTED)
#undef MINIQUANT_SUPPORTED
  }
  return false;
}

InstructionSet choose_instruction_set() { return choose().instruction_set; }

Bf16Unit choose_bf16_unit() { return choose().bf16_unit; }

}  // namespace miniquant::kernels
