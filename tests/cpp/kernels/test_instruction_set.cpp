#include <gtest/gtest.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/instruction_set.h"
#include "kernels/kernel_testing.h"

namespace miniquant::kernels {
namespace {

/// Sets or unsets MINIQUANT_ISA for one scope.
class ScopedOverride {
 public:
  explicit ScopedOverride(const char* value) {
    if (const char* before = std::getenv(kVariable); before != nullptr) {
      before_ = before;
    }
    set(value);
  }
  ScopedOverride(const ScopedOverride&) = delete;
  ScopedOverride& operator=(const ScopedOverride&) = delete;
  ~ScopedOverride() { set(before_.has_value() ? before_->c_str() : nullptr); }

 private:
  static constexpr const char* kVariable = "MINIQUANT_ISA";
  static void set(const char* value) {
    if (value == nullptr) {
      unsetenv(kVariable);
    } else {
      setenv(kVariable, value, /*overwrite=*/1);
    }
  }
  std::optional<std::string> before_;
};

std::string message_of_choice() {
  try {
    choose_instruction_set();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no exception";
}

std::vector<Bf16Unit> supported_units() {
  std::vector<Bf16Unit> supported;
  for (const Bf16Unit candidate : kBf16Units) {
    if (candidate != Bf16Unit::kNone && is_supported(candidate)) {
      supported.push_back(candidate);
    }
  }
  return supported;
}

std::string supported_names() {
  std::string names;
  for (const InstructionSet candidate : testing::supported_instruction_sets()) {
    names += (names.empty() ? "" : ", ") + std::string(name(candidate));
  }
  for (const Bf16Unit candidate : supported_units()) {
    names += ", " + std::string(name(candidate));
  }
  return names;
}

TEST(InstructionSet, HasTheNamesThatTheOverrideAccepts) {
  EXPECT_STREQ(name(InstructionSet::kBaseline), "baseline");
  EXPECT_STREQ(name(static_cast<InstructionSet>(17)), "unknown");
  for (const InstructionSet candidate : kInstructionSets) {
    EXPECT_EQ(instruction_set_named(name(candidate)), candidate);
  }
  for (const char* unknown : {"", "unknown", "Baseline", "baseline "}) {
    EXPECT_FALSE(instruction_set_named(unknown).has_value()) << unknown;
  }
}

TEST(InstructionSet, IsBuiltForThoseOfTheProcessor) {
  std::vector<std::string> names;
  for (const InstructionSet candidate : kInstructionSets) {
    names.emplace_back(name(candidate));
  }
#if defined(__x86_64__)
  EXPECT_EQ(names, (std::vector<std::string>{"baseline", "avx2", "avx512"}));
#elif defined(__aarch64__)
  EXPECT_EQ(names, (std::vector<std::string>{"baseline", "neon"}));
#else
  EXPECT_EQ(names, (std::vector<std::string>{"baseline"}));
#endif
}

TEST(InstructionSet, SupportsTheBaselineEverywhereAndNothingThatIsNotBuilt) {
  EXPECT_TRUE(is_supported(InstructionSet::kBaseline));
  EXPECT_FALSE(is_supported(static_cast<InstructionSet>(17)));
}

#if defined(__x86_64__)
TEST(InstructionSet, SupportsAvx2WhereverItSupportsAvx512) {
  EXPECT_TRUE(!is_supported(InstructionSet::kAvx512) || is_supported(InstructionSet::kAvx2));
}

TEST(InstructionSet, SupportsWhatTheCpuHas) {
  EXPECT_EQ(is_supported(InstructionSet::kAvx2), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
  EXPECT_EQ(is_supported(InstructionSet::kAvx512),
            __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("fma"));
}
#endif

TEST(InstructionSet, ChoosesTheStrongestWithoutAnOverride) {
  const InstructionSet strongest = testing::supported_instruction_sets().back();
  {
    const ScopedOverride unset(nullptr);
    EXPECT_EQ(choose_instruction_set(), strongest);
  }
  const ScopedOverride empty("");
  EXPECT_EQ(choose_instruction_set(), strongest);
}

TEST(InstructionSet, TakesEverySupportedOverride) {
  for (const InstructionSet candidate : testing::supported_instruction_sets()) {
    const ScopedOverride forced(name(candidate));
    EXPECT_EQ(choose_instruction_set(), candidate) << name(candidate);
    EXPECT_EQ(choose_bf16_unit(), Bf16Unit::kNone) << name(candidate);
  }
}

TEST(InstructionSet, TakesEverySupportedUnitWithTheStrongestInstructionSet) {
  for (const Bf16Unit candidate : supported_units()) {
    const ScopedOverride forced(name(candidate));
    EXPECT_EQ(choose_bf16_unit(), candidate) << name(candidate);
    EXPECT_EQ(choose_instruction_set(), testing::supported_instruction_sets().back());
  }
}

TEST(InstructionSet, ChoosesTheTileUnitWhereverItIsSupported) {
  const std::vector<Bf16Unit> supported = supported_units();
  if (supported.empty() || std::string(name(supported.back())) != "amx_bf16") {
    GTEST_SKIP() << "needs a CPU with amx_bf16";
  }
  const ScopedOverride unset(nullptr);
  EXPECT_EQ(choose_bf16_unit(), supported.back());
}

TEST(InstructionSet, NamesItsUnits) {
  EXPECT_STREQ(name(Bf16Unit::kNone), "none");
  EXPECT_STREQ(name(static_cast<Bf16Unit>(17)), "unknown");
  EXPECT_TRUE(is_supported(Bf16Unit::kNone));
  EXPECT_FALSE(is_supported(static_cast<Bf16Unit>(17)));
}

TEST(InstructionSet, RefusesUnknownOverridesWithTheSupportedNames) {
  for (const char* value : {"sse", "AVX2", " baseline", "avx51", "unknown", "none", "emulated"}) {
    const ScopedOverride forced(value);
    EXPECT_EQ(message_of_choice(), "MINIQUANT_ISA: expected one of the instruction sets supported here (" +
                                       supported_names() + "), but got '" + value + "'");
  }
}

TEST(InstructionSet, RefusesAnOverrideThatThisCpuCannotRun) {
  const auto refuses_unsupported = [](const auto& candidates) {
    for (const auto candidate : candidates) {
      if (is_supported(candidate)) {
        continue;
      }
      const ScopedOverride forced(name(candidate));
      EXPECT_EQ(message_of_choice(), "MINIQUANT_ISA: expected one of the instruction sets supported here (" +
                                         supported_names() + "), but got '" + name(candidate) + "'");
    }
  };
  refuses_unsupported(kInstructionSets);
  refuses_unsupported(kBf16Units);
}

}  // namespace
}  // namespace miniquant::kernels
