#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "kernels/triangle.h"

namespace miniquant::kernels {
namespace {

// none; one; a panel less one, filled and plus one; several panels, the last partly filled
constexpr std::int64_t kSizes[] = {0, 1, 47, 48, 49, 200};

TEST(Triangle, EveryEntryHasAnElementOfItsOwn) {
  for (const std::int64_t columns : kSizes) {
    const TriangleLayout layout{columns};
    std::vector<int> uses(static_cast<std::size_t>(layout.size()), 0);
    for (std::int64_t row = 0; row < columns; ++row) {
      for (std::int64_t column = 0; column <= row; ++column) {
        ++uses.at(static_cast<std::size_t>(layout.offset(row, column / kPanelColumns) + column % kPanelColumns));
      }
    }
    std::int64_t used = 0;
    for (const int count : uses) {
      ASSERT_LE(count, 1) << columns;
      used += count;
    }
    EXPECT_EQ(used, columns * (columns + 1) / 2);
  }
}

TEST(Triangle, ARowOfAPanelAndTheSpareRowsLieBeforeTheNextPanel) {
  for (const std::int64_t columns : kSizes) {
    const TriangleLayout layout{columns};
    std::int64_t begin = 0;
    for (std::int64_t panel = 0; panel < layout.panels(); ++panel) {
      EXPECT_EQ(layout.offset(panel * kPanelColumns, panel), begin);
      for (std::int64_t row = panel * kPanelColumns; row < columns + kSpareRows; ++row) {
        EXPECT_EQ(layout.offset(row, panel), begin);
        begin += kPanelColumns;
      }
    }
    EXPECT_EQ(layout.size(), begin) << columns;
  }
}

// K^2 / 2, plus less than one panel and the spare rows.
TEST(Triangle, TakesHalfOfTheSquare) {
  const std::int64_t columns = 4096;
  const std::int64_t size = TriangleLayout{columns}.size();
  EXPECT_GE(size, columns * (columns + 1) / 2);
  EXPECT_LE(size, columns * columns / 2 + columns * (kPanelColumns / 2 + kSpareRows + 1));
}

}  // namespace
}  // namespace miniquant::kernels
