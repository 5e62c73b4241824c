#include <ATen/core/dispatch/Dispatcher.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <miniquant/build.h>

#include <array>
#include <cstdlib>
#include <string>
#include <string_view>

namespace miniquant {
namespace {

std::string ask_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<std::string()>().call();
}

TEST(Build, VersionIsThatOfTheOperatorAndHasThreeNumbers) {
  EXPECT_EQ(version(), ask_operator("miniquant::version"));
  EXPECT_THAT(std::string(version()), ::testing::MatchesRegex("[0-9]+\\.[0-9]+\\.[0-9]+"));
}

#if defined(__aarch64__)
constexpr std::array kNamesOfInstructionSets = {std::string_view("baseline"), std::string_view("neon")};
constexpr std::array kNamesOfUnits = {std::string_view("none"), std::string_view("neon_bf16")};
#else
constexpr std::array kNamesOfInstructionSets = {std::string_view("baseline"), std::string_view("avx2"),
                                                std::string_view("avx512")};
constexpr std::array kNamesOfUnits = {std::string_view("none"), std::string_view("avx512_bf16"),
                                      std::string_view("amx_bf16")};
#endif

TEST(Build, InstructionSetIsThatOfTheOperatorAndKeepsItsName) {
  const std::string before(instruction_set());
  EXPECT_EQ(before, ask_operator("miniquant::instruction_set"));
  EXPECT_THAT(before, ::testing::AnyOfArray(kNamesOfInstructionSets));
  // The kernels are chosen once: the environment changes nothing now.
  const char* const forced = std::getenv("MINIQUANT_ISA");
  const std::string restored = forced == nullptr ? "" : forced;
  setenv("MINIQUANT_ISA", before == "baseline" ? "avx2" : "baseline", 1);
  EXPECT_EQ(instruction_set(), before);
  setenv("MINIQUANT_ISA", restored.c_str(), 1);
}

TEST(Build, UnitIsThatOfTheOperator) {
  EXPECT_EQ(bfloat16_unit(), ask_operator("miniquant::bfloat16_unit"));
  EXPECT_THAT(std::string(bfloat16_unit()), ::testing::AnyOfArray(kNamesOfUnits));
}

}  // namespace
}  // namespace miniquant
