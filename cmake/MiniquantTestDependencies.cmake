# GoogleTest: the installed package first; for another processor the sources that Debian's package has; then a pinned and
# hashed download.

include(FetchContent)

find_package(GTest 1.11 QUIET)
if(NOT TARGET GTest::gtest_main OR NOT TARGET GTest::gmock)
  if(CMAKE_CROSSCOMPILING AND EXISTS /usr/src/googletest/CMakeLists.txt)
    set(FETCHCONTENT_SOURCE_DIR_GOOGLETEST /usr/src/googletest)
  endif()
  FetchContent_Declare(googletest
    URL https://github.com/google/googletest/archive/refs/tags/v1.14.0.tar.gz
    URL_HASH SHA256=8ad598c73ad796e0d8280b082cebd82a630d73e73cd3c70057938a6501bba5d7)
  set(INSTALL_GTEST OFF CACHE INTERNAL "")
  FetchContent_MakeAvailable(googletest)
  if(NOT TARGET GTest::gmock) # sources before 1.11 have no such names
    message(FATAL_ERROR "expected GoogleTest 1.11 or newer, but got an older one")
  endif()
endif()
