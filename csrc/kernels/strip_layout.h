#pragma once

#include <cstdint>
#include <vector>

namespace miniquant::kernels {

/// Columns per strip of packed coefficients, for every instruction set.
inline constexpr std::int64_t kStripColumns = 4;

/// How the columns 0..K-1 of a sweep are cut, and where each piece of the packed upper triangle lies.
///
/// Blocks are made of segments, segments of strips of at most kStripColumns columns; all end at K. A strip that starts
/// at column m holds rows 0 .. m + kStripColumns - 1 of its columns, row by row, padded with zeros to kStripColumns:
///   packed[offset + row * kStripColumns + c] = C[row, m + c]
struct StripLayout {
  std::vector<std::int64_t> block_begin;    ///< [blocks + 1], columns
  std::vector<std::int64_t> segment_begin;  ///< [segments + 1], columns; contains every block's begin
  std::vector<std::int64_t> strip_begin;    ///< [strips + 1], columns; contains every segment's begin
  std::vector<std::int64_t> strip_offset;   ///< [strips], elements into the packed triangle
  std::int64_t packed_size = 0;             ///< elements of the packed triangle

  [[nodiscard]] std::int64_t strips() const { return static_cast<std::int64_t>(strip_offset.size()); }
};

/// Cuts `columns` into segments of `segment_columns` and blocks of `block_segments` segments each.
/// All arguments at least 1, but `columns` may be 0.
StripLayout make_strip_layout(std::int64_t columns, std::int64_t segment_columns, std::int64_t block_segments);

}  // namespace miniquant::kernels
