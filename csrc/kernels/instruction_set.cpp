#include "kernels/instruction_set.h"

#include <array>
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

/// What is known of an instruction set, in the order of the enumeration.
struct SetEntry {
  const char* name;
  bool (*is_supported)();
};

constexpr std::array kSetEntries = {
#define MINIQUANT_ENTRY(name, enumerator, supported) SetEntry{#name, [] { return static_cast<bool>(supported); }},
    MINIQUANT_FOR_EACH_INSTRUCTION_SET(MINIQUANT_ENTRY)
#undef MINIQUANT_ENTRY
};

/// The same of a unit. One that is not preferred, which multiplies no faster than the instruction sets, is chosen only
/// where MINIQUANT_ISA names it.
struct UnitEntry {
  const char* name;
  bool (*is_supported)();
  bool (*is_preferred)();
};

constexpr std::array kUnitEntries = {UnitEntry{"none", [] { return true; }, [] { return true; }},
#define MINIQUANT_ENTRY(name, enumerator, supported, preferred) \
  UnitEntry{#name, [] { return static_cast<bool>(supported); }, [] { return static_cast<bool>(preferred); }},
                                     MINIQUANT_FOR_EACH_BF16_UNIT(MINIQUANT_ENTRY)
#undef MINIQUANT_ENTRY
};

/// The entry of an enumerator; nullptr for a value that is none.
const SetEntry* entry_of(InstructionSet instruction_set) {
  const auto place = static_cast<size_t>(instruction_set);
  return place < kSetEntries.size() ? &kSetEntries[place] : nullptr;
}

const UnitEntry* entry_of(Bf16Unit unit) {
  const auto place = static_cast<size_t>(unit);
  return place < kUnitEntries.size() ? &kUnitEntries[place] : nullptr;
}

template <typename T>
const char* name_of(T value) {
  const auto* const entry = entry_of(value);
  return entry == nullptr ? "unknown" : entry->name;
}

template <typename T>
bool is_entry_supported(T value) {
  const auto* const entry = entry_of(value);
  return entry != nullptr && entry->is_supported();
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
    if (entry_of(candidate)->is_preferred() && is_supported(candidate)) {
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

const char* name(InstructionSet instruction_set) { return name_of(instruction_set); }

const char* name(Bf16Unit unit) { return name_of(unit); }

std::optional<InstructionSet> instruction_set_named(std::string_view wanted) {
  for (const InstructionSet candidate : kInstructionSets) {
    if (wanted == name(candidate)) {
      return candidate;
    }
  }
  return std::nullopt;
}

bool is_supported(InstructionSet instruction_set) { return is_entry_supported(instruction_set); }

bool is_supported(Bf16Unit unit) { return is_entry_supported(unit); }

InstructionSet choose_instruction_set() { return choose().instruction_set; }

Bf16Unit choose_bf16_unit() { return choose().bf16_unit; }

}  // namespace miniquant::kernels
