#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "algorithms/packed_triangle.h"
#include "tensor_testing.h"

namespace miniquant::algorithms {
namespace {

TEST(PackedTriangle, HoldsEveryEntryOfTheUpperTriangleOnceAndZerosElsewhere) {
  for (const int threads : {1, 2}) {
    const testing::ScopedThreads scoped(threads);
    for (const int64_t columns : {0, 1, 4, 11}) {
      for (const int64_t segment : {1, 3, 8}) {
        const kernels::StripLayout layout = kernels::make_strip_layout(columns, segment, 2);
        std::vector<double> packed(static_cast<size_t>(layout.packed_size), -1.0);
        const auto entry = [](int64_t i, int64_t j) { return static_cast<double>(100 * i + j + 1); };
        pack_triangle(layout, packed.data(), entry);
        std::vector<double> expected(packed.size(), 0.0);
        for (size_t strip = 0; strip + 1 < layout.strip_begin.size(); ++strip) {
          for (int64_t j = layout.strip_begin[strip]; j < layout.strip_begin[strip + 1]; ++j) {
            for (int64_t i = 0; i <= j; ++i) {
              const int64_t at =
                  layout.strip_offset[strip] + i * kernels::kStripColumns + j - layout.strip_begin[strip];
              expected[static_cast<size_t>(at)] = entry(i, j);
            }
          }
        }
        EXPECT_EQ(packed, expected) << columns << " columns, segments of " << segment;
      }
    }
  }
}

}  // namespace
}  // namespace miniquant::algorithms
