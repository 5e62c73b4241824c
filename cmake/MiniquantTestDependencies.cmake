# GoogleTest: the installed package first, then a pinned and hashed download.

include(FetchContent)

find_package(GTest 1.11 QUIET)
if(NOT TARGET GTest::gtest_main OR NOT TARGET GTest::gmock)
  FetchContent_Declare(googletest
    URL https://github.com/google/googletest/archive/refs/tags/v1.14.0.tar.gz
    URL_HASH SHA256=8ad598c73ad796e0d8280b082cebd82a630d73e73cd3c70057938a6501bba5d7)
  set(INSTALL_GTEST OFF CACHE INTERNAL "")
  FetchContent_MakeAvailable(googletest)
endif()
