#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <string>
#include <system_error>

#include "driver/atomic_file.h"
#include "temporary_folder.h"

namespace {

// A target to which rename() fails, as on a failing disk.
std::string failing_rename;

}  // namespace

// Replaces rename() of the C library: nothing else makes only the second of several renames fail.
extern "C" int rename(const char* from, const char* to) {
  if (!failing_rename.empty() && failing_rename == to && std::string(from).ends_with(".tmp")) {
    errno = EIO;
    return -1;
  }
  return static_cast<int>(::syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}

namespace miniquant::driver {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

TEST(AtomicFile, WritesAllIntoAFolderItMakes) {
  const TemporaryFolder folder;
  write_files({{folder.path() / "a" / "b" / "one", "1\n"}, {folder.path() / "a" / "b" / "two", std::string("\0x", 2)}});
  EXPECT_EQ(folder.read("a/b/one"), "1\n");
  EXPECT_EQ(folder.read("a/b/two"), std::string("\0x", 2));
  EXPECT_EQ(fs::hard_link_count(folder.path() / "a/b/one"), 1U);
}

TEST(AtomicFile, ReplacesAndLeavesNothingElse) {
  const TemporaryFolder folder;
  static_cast<void>(folder.write("one", "a longer text than the new one"));
  write_files({{folder.path() / "one", "new"}, {folder.path() / "two", ""}});
  EXPECT_EQ(folder.read("one"), "new");
  EXPECT_EQ(folder.read("two"), "");
  EXPECT_THAT(folder.names(), ElementsAre("one", "two"));
}

TEST(AtomicFile, FollowsTheUmask) {
  const TemporaryFolder folder;
  const mode_t before = ::umask(027);
  write_files({{folder.path() / "one", "1"}});
  ::umask(before);
  EXPECT_EQ(fs::status(folder.path() / "one").permissions(), fs::perms(0640));
}

TEST(AtomicFile, AFolderInThePlaceOfOneFileStopsAll) {
  const TemporaryFolder folder;
  static_cast<void>(folder.write("one", "old"));
  fs::create_directory(folder.path() / "two");
  try {
    write_files({{folder.path() / "one", "new"}, {folder.path() / "two", "2"}, {folder.path() / "three", "3"}});
    FAIL() << "expected std::system_error";
  } catch (const std::system_error& error) {
    EXPECT_THAT(error.what(), HasSubstr((folder.path() / "two").string()));
  }
  EXPECT_EQ(folder.read("one"), "old");
  EXPECT_THAT(folder.names(), ElementsAre("one", "two"));
}

// A limit on file sizes stands in for a full disk: the second file does not fit.
TEST(AtomicFile, AFileThatDoesNotFitTakesTheOthersBack) {
  const TemporaryFolder folder;
  static_cast<void>(folder.write("one", "old"));
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{.rlim_cur = 1000, .rlim_max = before.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  EXPECT_THROW(write_files({{folder.path() / "one", "new"}, {folder.path() / "two", std::string(2000, 'x')}}),
               std::system_error);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(folder.read("one"), "old");
  EXPECT_THAT(folder.names(), ElementsAre("one"));
}

// Renaming fails after the first file has been renamed: existing files are restored, and new ones removed.
TEST(AtomicFile, ARenameThatFailsPutsBackWhatWasThere) {
  const TemporaryFolder folder;
  static_cast<void>(folder.write("one", "old"));
  static_cast<void>(folder.write("three", "old 3"));
  failing_rename = (folder.path() / "three").string();
  EXPECT_THROW(
      write_files({{folder.path() / "one", "new"}, {folder.path() / "two", "2"}, {folder.path() / "three", "3"}}),
      std::system_error);
  failing_rename.clear();
  EXPECT_EQ(folder.read("one"), "old");
  EXPECT_EQ(folder.read("three"), "old 3");
  EXPECT_THAT(folder.names(), ElementsAre("one", "three"));
}

TEST(AtomicFile, AFileIsNotAFolder) {
  const TemporaryFolder folder;
  const fs::path file = folder.write("file", "");
  EXPECT_THROW(write_files({{file / "one", "1"}}), std::system_error);
  EXPECT_THROW(write_files({{file / "below" / "one", "1"}}), std::system_error);
  EXPECT_THAT(folder.read("file"), IsEmpty());
}

}  // namespace
}  // namespace miniquant::driver
