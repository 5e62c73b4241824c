#include <ATen/core/dispatch/Dispatcher.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <miniquant/build.h>

#include <cstdlib>
#include <string>

namespace miniquant {
namespace {

std::string ask_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<std::string()>().call();
}

TEST(Build, VersionIsThatOfTheOperatorAndHasThreeNumbers) {
  EXPECT_EQ(version(), ask_operator("miniquant::version"));
  EXPECT_THAT(std::string(version()), ::testing::MatchesRegex("[0-9]+\\.[0-9]+\\.[0-9]+"));
}

TEST(Build, InstructionSetIsThatOfTheOperatorAndKeepsItsName) {
  const std::string before(instruction_set());
  EXPECT_EQ(before, ask_operator("miniquant::instruction_set"));
  EXPECT_THAT(before, ::testing::AnyOf("baseline", "avx2", "avx512", "neon"));
  // The kernels are chosen once: the environment changes nothing now.
  const char* const forced = std::getenv("MINIQUANT_ISA");
  const std::string restored = forced == nullptr ? "" : forced;
  setenv("MINIQUANT_ISA", before == "baseline" ? "avx2" : "baseline", 1);
  EXPECT_EQ(instruction_set(), before);
  setenv("MINIQUANT_ISA", restored.c_str(), 1);
}

TEST(Build, UnitIsThatOfTheOperator) {
  EXPECT_EQ(bfloat16_unit(), ask_operator("miniquant::bfloat16_unit"));
  EXPECT_THAT(std::string(bfloat16_unit()), ::testing::AnyOf("none", "avx512_bf16", "amx_bf16", "neon_bf16"));
}

}  // namespace
}  // namespace miniquant
