#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "driver/build_info.h"

namespace miniquant::driver {
namespace {

using testing::AnyOf;
using testing::MatchesRegex;

TEST(BuildInfo, SaysWhatItWasBuiltFrom) {
  const BuildInfo& info = build_info();
  EXPECT_THAT(info.miniquant, MatchesRegex("[0-9]+\\.[0-9]+\\.[0-9]+"));
#if defined(__aarch64__)
  EXPECT_THAT(info.torch, MatchesRegex("2\\.1[03]\\..*"));  // scripts/arm_torch.sh has another one than scripts/setup
#else
  EXPECT_THAT(info.torch, MatchesRegex("2\\.13\\..*"));
#endif
  EXPECT_THAT(info.compiler, MatchesRegex("[A-Za-z]+ [0-9]+\\..*"));
  EXPECT_EQ(info.cxx_standard, "C++20");
  EXPECT_THAT(info.git_revision, AnyOf("", MatchesRegex("[0-9a-f]+")));
  EXPECT_THAT(info.git_revision.size(), AnyOf(0U, 40U, 64U));
}

}  // namespace
}  // namespace miniquant::driver
