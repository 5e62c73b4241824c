#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "algorithms/parallel.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

constexpr int64_t kMuch = 100 * kSerialOperations;

TEST(Parallel, TeamIsOneThreadForLittleWorkAndWithinARegion) {
  const testing::ScopedThreads scoped(2);
  EXPECT_EQ(team_size(100, kMuch), 2);
  EXPECT_EQ(team_size(1, kMuch), 1);
  EXPECT_EQ(team_size(0, kMuch), 1);
  EXPECT_EQ(team_size(100, kSerialOperations - 1), 1);
  std::atomic<int64_t> largest = 0;
  at::parallel_for(0, 2, 1, [&](int64_t, int64_t) { largest.store(std::max(largest.load(), team_size(100, kMuch))); });
  EXPECT_EQ(largest.load(), 1);
}

TEST(Parallel, EveryPieceIsTakenOnce) {
  for (const int threads : {1, 2, 7}) {
    const testing::ScopedThreads scoped(threads);
    for (const int64_t count : {0, 1, 2, 5, 1000}) {
      std::vector<std::atomic<int>> visits(static_cast<size_t>(count));
      for_pieces(count, kMuch, [&](int64_t piece) { ++visits.at(static_cast<size_t>(piece)); });
      for (const std::atomic<int>& visit : visits) {
        EXPECT_EQ(visit.load(), 1);
      }
    }
  }
}

TEST(Parallel, PiecesAreLeftToThreadsThatAreFree) {
  const testing::ScopedThreads scoped(2);
  constexpr int64_t kCount = 100;
  std::atomic<int64_t> others = 0;
  // The thread that takes the first piece keeps it until all the others are done.
  for_pieces(kCount, kMuch, [&](int64_t piece) {
    if (piece > 0) {
      ++others;
      return;
    }
    while (others.load() < kCount - 1) {
      std::this_thread::yield();
    }
  });
  EXPECT_EQ(others.load(), kCount - 1);
}

TEST(Parallel, WaitsForWhatAnotherMemberDoes) {
  for (const int threads : {1, 2, 7}) {
    const testing::ScopedThreads scoped(threads);
    constexpr int64_t kCount = 500;
    Team team(team_size(kCount, kMuch));
    Pieces pieces(kCount);
    std::atomic<int64_t> done = 0;
    bool in_order = true;  // each piece waits for the one before it
    team.run([&] {
      for (int64_t piece = 0; pieces.take(piece);) {
        in_order = team.wait_until([&] { return done.load() == piece; }) && in_order;
        done.store(piece + 1);
      }
    });
    EXPECT_TRUE(in_order);
    EXPECT_EQ(done.load(), kCount);
  }
}

TEST(Parallel, ExceptionOfOneMemberEndsTheWaitsOfTheOthersAndReachesTheCaller) {
  for (const int threads : {1, 2, 7}) {
    const testing::ScopedThreads scoped(threads);
    Team team(threads);
    Pieces pieces(threads);
    const auto member = [&] {
      int64_t piece = 0;
      if (pieces.take(piece) && piece == 0) {
        throw std::runtime_error("the first");
      }
      EXPECT_FALSE(team.wait_until([] { return false; }));
    };
    EXPECT_THROW(team.run(member), std::runtime_error);
  }
}

}  // namespace
}  // namespace miniquant::algorithms
