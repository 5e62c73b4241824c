#include <gtest/gtest.h>

#include <atomic>
#include <type_traits>
#include <vector>

#include "algorithms/dispatch.h"
#include "algorithms/parallel.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

TEST(Dispatch, CallsTheBodyForTheComputeDtype) {
  std::string called;
  const auto body = [&]<typename T> { called = std::is_same_v<T, double> ? "double" : "float"; };
  dispatch_compute(at::kDouble, body);
  EXPECT_EQ(called, "double");
  dispatch_compute(at::kFloat, body);
  EXPECT_EQ(called, "float");
  EXPECT_THROW(dispatch_compute(at::kHalf, body), c10::Error);
}

TEST(Dispatch, TypedKernelsAreTheChosenOnes) {
  EXPECT_EQ(&typed_kernels<float>(), &kernels::kernels().f32);
  EXPECT_EQ(&typed_kernels<double>(), &kernels::kernels().f64);
}

constexpr int64_t kMuch = 100 * kSerialOperations;

TEST(Dispatch, PiecesCoverEveryRowOnceAndBeginAtMultiplesOfATile) {
  constexpr int64_t kTileRows = 24;
  for (const int threads : {1, 2, 7}) {
    const testing::ScopedThreads scoped(threads);
    for (const int64_t rows : {0, 1, 23, 24, 25, 500, 5000}) {
      std::vector<std::atomic<int>> visits(static_cast<size_t>(rows));
      for_row_tiles(rows, kTileRows, kMuch, [&](int64_t begin, int64_t end) {
        EXPECT_EQ(begin % kTileRows, 0);
        EXPECT_LE(end - begin, rows_per_piece(rows, kTileRows));
        for (int64_t row = begin; row < end; ++row) {
          ++visits.at(static_cast<size_t>(row));
        }
      });
      for (const std::atomic<int>& visit : visits) {
        EXPECT_EQ(visit.load(), 1) << rows;
      }
    }
  }
}

TEST(Dispatch, PiecesOfRowsGiveEveryThreadSeveralAndAreWholePasses) {
  constexpr int64_t kTileRows = 24;
  const testing::ScopedThreads scoped(2);
  EXPECT_EQ(rows_per_piece(0, kTileRows), kTileRows);
  EXPECT_EQ(rows_per_piece(8 * kTileRows, kTileRows), kTileRows);
  EXPECT_EQ(rows_per_piece(9 * kTileRows, kTileRows), 2 * kTileRows);
  EXPECT_EQ(rows_per_piece(32 * kTileRows, kTileRows), 4 * kTileRows);
  EXPECT_EQ(rows_per_piece(33 * kTileRows, kTileRows), 4 * kTileRows);
}

TEST(Dispatch, TriangleVisitsEveryIndexOnceTheLongestFirst) {
  for (const int threads : {1, 2}) {
    const testing::ScopedThreads scoped(threads);
    for (const int64_t count : {0, 1, 2, 5, 64}) {
      std::vector<std::atomic<int>> visits(static_cast<size_t>(count));
      for_triangle(count, kMuch, [&](int64_t index) { ++visits.at(static_cast<size_t>(index)); });
      for (const std::atomic<int>& visit : visits) {
        EXPECT_EQ(visit.load(), 1) << count;
      }
    }
  }
  const testing::ScopedThreads scoped(1);
  std::vector<int64_t> order;
  for_triangle(4, kMuch, [&](int64_t index) { order.push_back(index); });
  EXPECT_EQ(order, (std::vector<int64_t>{3, 2, 1, 0}));
}

}  // namespace
}  // namespace miniquant::algorithms
