#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "driver/progress.h"

namespace miniquant::driver {
namespace {

using testing::ElementsAre;
using testing::EndsWith;

TEST(Progress, SaysNothingWhereItIsNotEnabled) {
  std::ostringstream stream;
  {
    Progress progress(stream, false, 3);
    progress.step("one");
    progress.finish();
  }
  EXPECT_EQ(stream.str(), "");
}

TEST(Progress, ShowsWhatIsDoneAndWipesItself) {
  std::ostringstream stream;
  {
    Progress progress(stream, true, 2);
    progress.step("one");
    EXPECT_THAT(stream.str(), EndsWith("[........................] 0/2  one"));
    progress.step("two");
    EXPECT_THAT(stream.str(), EndsWith("[############............] 1/2  two"));
    progress.step("three");
    progress.step("one more than was said");
    EXPECT_THAT(stream.str(), EndsWith("[########################] 2/2  one more than was said"));
    EXPECT_EQ(stream.str().find('\n'), std::string::npos);
  }
  EXPECT_THAT(stream.str(), EndsWith("said\r\x1b[K"));
}

TEST(Stages, AnnouncesRunsAndTakesTheTime) {
  std::vector<std::string> announced;
  Stages stages([&](std::string_view name) { announced.emplace_back(name); });
  stages.run("a", [&] { EXPECT_THAT(announced, ElementsAre("a")); });
  const auto pause = std::chrono::milliseconds(20);
  stages.run("b", [&] { std::this_thread::sleep_for(pause); });
  EXPECT_THAT(announced, ElementsAre("a", "b"));
  ASSERT_EQ(stages.seconds().size(), 2U);
  EXPECT_EQ(stages.seconds()[0].first, "a");
  EXPECT_EQ(stages.seconds()[1].first, "b");
  EXPECT_GE(stages.seconds()[0].second, 0.0);
  EXPECT_GE(stages.seconds()[1].second, 0.02);
  EXPECT_LT(stages.seconds()[1].second, 10.0);
}

TEST(Stages, AStageThatFailsHasNoTime) {
  Stages stages([](std::string_view) {});
  EXPECT_THROW(stages.run("a", [] { throw std::runtime_error("a"); }), std::runtime_error);
  EXPECT_TRUE(stages.seconds().empty());
}

}  // namespace
}  // namespace miniquant::driver
