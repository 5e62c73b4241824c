#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/strip_layout.h"

namespace miniquant::kernels {
namespace {

struct Cut {
  std::int64_t columns;
  std::int64_t segment_columns;
  std::int64_t block_segments;
};

const std::vector<Cut> kCuts = {
    {0, 4, 1},                               // nothing to cut
    {1, 1, 1},                               // one strip of one column
    {3, 8, 1},                               // less than a strip, segment longer than the columns
    {4, 4, 1},                               // one full strip
    {5, 4, 1},                               // a strip plus one
    {7, 7, 1},                               // a segment that is no multiple of a strip
    {64, 7, 2},                              // blocks of two such segments, and a shorter last one
    {64, 64, 1},                             // one segment
    {65, 64, 1},                             // a segment plus one column
    {130, 10, 6},                            // a last block with fewer segments
    {130, 1, 128},                           // segments of one column: every strip has one
    {300, 300, 5},                           // one segment, blocks never filled
    {12, 3, INT64_MAX}, {12, INT64_MAX, 1},  // lengths that overflow when added to
};

bool contains(const std::vector<std::int64_t>& sorted, std::int64_t value) {
  return std::binary_search(sorted.begin(), sorted.end(), value);
}

void expect_increasing_to(const std::vector<std::int64_t>& begins, std::int64_t columns) {
  ASSERT_FALSE(begins.empty());
  EXPECT_EQ(begins.back(), columns);
  EXPECT_TRUE(columns == 0 ? begins.size() == 1 : begins.front() == 0);
  EXPECT_TRUE(std::adjacent_find(begins.begin(), begins.end(), std::greater_equal<>()) == begins.end());
}

TEST(StripLayout, CutsTheColumnsOnceAndInOrder) {
  for (const Cut& cut : kCuts) {
    SCOPED_TRACE(::testing::Message() << cut.columns << " columns by " << cut.segment_columns << " by "
                                      << cut.block_segments);
    const StripLayout layout = make_strip_layout(cut.columns, cut.segment_columns, cut.block_segments);
    expect_increasing_to(layout.block_begin, cut.columns);
    expect_increasing_to(layout.segment_begin, cut.columns);
    expect_increasing_to(layout.strip_begin, cut.columns);
    EXPECT_EQ(layout.strips(), static_cast<std::int64_t>(layout.strip_begin.size()) - 1);
    for (std::size_t strip = 0; strip + 1 < layout.strip_begin.size(); ++strip) {
      EXPECT_LE(layout.strip_begin[strip + 1] - layout.strip_begin[strip], kStripColumns);
    }
  }
}

TEST(StripLayout, StripsStartAnewAtSegmentsAndSegmentsAtBlocks) {
  for (const Cut& cut : kCuts) {
    SCOPED_TRACE(::testing::Message() << cut.columns << " columns by " << cut.segment_columns << " by "
                                      << cut.block_segments);
    const StripLayout layout = make_strip_layout(cut.columns, cut.segment_columns, cut.block_segments);
    for (const std::int64_t begin : layout.segment_begin) {
      EXPECT_TRUE(contains(layout.strip_begin, begin)) << begin;
      EXPECT_TRUE(begin == cut.columns || begin % cut.segment_columns == 0) << begin;
    }
    for (std::size_t block = 0; block + 1 < layout.block_begin.size(); ++block) {
      const std::int64_t begin = layout.block_begin[block];
      const std::int64_t end = layout.block_begin[block + 1];
      EXPECT_TRUE(contains(layout.segment_begin, begin)) << begin;
      const auto segments = std::count_if(layout.segment_begin.begin(), layout.segment_begin.end(),
                                          [&](std::int64_t at) { return at >= begin && at < end; });
      EXPECT_TRUE(segments == cut.block_segments || end == cut.columns) << begin;
      EXPECT_LE(segments, cut.block_segments) << begin;
    }
  }
}

TEST(StripLayout, StripsLieOneAfterTheOtherWithRoomForTheirRows) {
  for (const Cut& cut : kCuts) {
    const StripLayout layout = make_strip_layout(cut.columns, cut.segment_columns, cut.block_segments);
    std::int64_t offset = 0;
    for (std::int64_t strip = 0; strip < layout.strips(); ++strip) {
      const auto at = static_cast<std::size_t>(strip);
      EXPECT_EQ(layout.strip_offset[at], offset);
      offset += (layout.strip_begin[at] + kStripColumns) * kStripColumns;
    }
    EXPECT_EQ(layout.packed_size, offset);
  }
}

TEST(StripLayout, ExampleOfTwoBlocks) {
  const StripLayout layout = make_strip_layout(11, 5, 2);
  EXPECT_EQ(layout.block_begin, (std::vector<std::int64_t>{0, 10, 11}));
  EXPECT_EQ(layout.segment_begin, (std::vector<std::int64_t>{0, 5, 10, 11}));
  EXPECT_EQ(layout.strip_begin, (std::vector<std::int64_t>{0, 4, 5, 9, 10, 11}));
  EXPECT_EQ(layout.strip_offset, (std::vector<std::int64_t>{0, 16, 48, 84, 136}));
  EXPECT_EQ(layout.packed_size, 192);
}

}  // namespace
}  // namespace miniquant::kernels
