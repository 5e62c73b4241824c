#include "kernels/strip_layout.h"

#include <algorithm>

namespace miniquant::kernels {

StripLayout make_strip_layout(std::int64_t columns, std::int64_t segment_columns, std::int64_t block_segments) {
  StripLayout layout;
  std::int64_t segment = 0;
  for (std::int64_t segment_begin = 0; segment_begin < columns; ++segment) {
    if (segment % block_segments == 0) {
      layout.block_begin.push_back(segment_begin);
    }
    layout.segment_begin.push_back(segment_begin);
    const std::int64_t segment_end = segment_begin + std::min(segment_columns, columns - segment_begin);
    for (std::int64_t strip = segment_begin; strip < segment_end; strip += kStripColumns) {
      layout.strip_begin.push_back(strip);
      layout.strip_offset.push_back(layout.packed_size);
      layout.packed_size += (strip + kStripColumns) * kStripColumns;
    }
    segment_begin = segment_end;
  }
  layout.block_begin.push_back(columns);
  layout.segment_begin.push_back(columns);
  layout.strip_begin.push_back(columns);
  return layout;
}

}  // namespace miniquant::kernels
