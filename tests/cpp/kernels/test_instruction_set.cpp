#include <gtest/gtest.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include "kernels/instruction_set.h"
#include "kernels/kernel_testing.h"

namespace miniquant::kernels {
namespace {

/// Sets MINIQUANT_ISA for one scope, or takes it away.
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

std::string supported_names() {
  std::string names;
  for (const InstructionSet candidate : testing::supported_instruction_sets()) {
    names += (names.empty() ? "" : ", ") + std::string(name(candidate));
  }
  return names;
}

TEST(InstructionSet, HasTheNamesThatTheOverrideAccepts) {
  EXPECT_STREQ(name(InstructionSet::kBaseline), "baseline");
  EXPECT_STREQ(name(InstructionSet::kAvx2), "avx2");
  EXPECT_STREQ(name(InstructionSet::kAvx512), "avx512");
  EXPECT_STREQ(name(static_cast<InstructionSet>(17)), "unknown");
}

TEST(InstructionSet, SupportsTheBaselineEverywhereAndAvx2WhereverAvx512Is) {
  EXPECT_TRUE(is_supported(InstructionSet::kBaseline));
  EXPECT_TRUE(!is_supported(InstructionSet::kAvx512) || is_supported(InstructionSet::kAvx2));
  EXPECT_FALSE(is_supported(static_cast<InstructionSet>(17)));
}

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
  }
}

TEST(InstructionSet, RefusesUnknownOverridesWithTheSupportedNames) {
  for (const char* value : {"sse", "AVX2", " baseline", "avx51"}) {
    const ScopedOverride forced(value);
    EXPECT_EQ(message_of_choice(), "MINIQUANT_ISA: expected one of the instruction sets supported here (" +
                                       supported_names() + "), but got '" + value + "'");
  }
}

TEST(InstructionSet, RefusesAnOverrideThatThisCpuCannotRun) {
  for (const InstructionSet candidate : {InstructionSet::kAvx2, InstructionSet::kAvx512}) {
    if (is_supported(candidate)) {
      continue;
    }
    const ScopedOverride forced(name(candidate));
    EXPECT_EQ(message_of_choice(), "MINIQUANT_ISA: expected one of the instruction sets supported here (" +
                                       supported_names() + "), but got '" + name(candidate) + "'");
  }
}

}  // namespace
}  // namespace miniquant::kernels
