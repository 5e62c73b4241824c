#include <gtest/gtest.h>

#include <type_traits>
#include <vector>

#include "algorithms/dispatch.h"
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

TEST(Dispatch, SharesCoverEveryRowOnceAndBeginAtMultiplesOfATile) {
  constexpr int64_t kTileRows = 24;
  for (const int threads : {1, 2}) {
    const testing::ScopedThreads scoped(threads);
    for (const int64_t rows : {0, 1, 23, 24, 25, 500}) {
      std::vector<int> visits(static_cast<size_t>(rows), 0);
      for_row_tiles(rows, kTileRows, [&](int64_t begin, int64_t end) {
        EXPECT_EQ(begin % kTileRows, 0);
        for (int64_t row = begin; row < end; ++row) {
          ++visits.at(static_cast<size_t>(row));
        }
      });
      EXPECT_EQ(visits, std::vector<int>(static_cast<size_t>(rows), 1)) << rows;
    }
  }
}

TEST(Dispatch, TriangleVisitsEveryIndexOnce) {
  for (const int threads : {1, 2}) {
    const testing::ScopedThreads scoped(threads);
    for (const int64_t count : {0, 1, 2, 5, 64}) {
      std::vector<int> visits(static_cast<size_t>(count), 0);
      for_triangle(count, [&](int64_t index) { ++visits.at(static_cast<size_t>(index)); });
      EXPECT_EQ(visits, std::vector<int>(static_cast<size_t>(count), 1)) << count;
    }
  }
}

TEST(Dispatch, TriangleGivesBothHalvesOfTheSequenceAboutTheSameWork) {
  const testing::ScopedThreads scoped(1);
  constexpr int64_t kCount = 64;
  std::vector<int64_t> order;
  for_triangle(kCount, [&](int64_t index) { order.push_back(index); });
  int64_t first_half = 0;
  for (size_t i = 0; i < kCount / 2; ++i) {
    first_half += order[i];
  }
  EXPECT_EQ(first_half, kCount * (kCount - 1) / 4);
}

}  // namespace
}  // namespace miniquant::algorithms
