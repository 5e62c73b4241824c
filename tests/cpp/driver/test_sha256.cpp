#include <gtest/gtest.h>

#include "driver/sha256.h"

namespace miniquant::driver {
namespace {

// The examples of FIPS 180-4, and the empty message.
TEST(Sha256, KnownDigests) {
  EXPECT_EQ(sha256(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
}

TEST(Sha256, ZeroBytesCount) {
  const char zeros[2] = {0, 0};
  EXPECT_NE(sha256(zeros, 1), sha256(zeros, 2));
  EXPECT_EQ(sha256(zeros, 0), sha256(""));
}

}  // namespace
}  // namespace miniquant::driver
