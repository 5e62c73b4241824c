#include "algorithms/packing.h"

#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_left_shift.h>
#include <ATen/ops/bitwise_or.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/stack.h>

#include <numeric>
#include <vector>

// The layout of a row repeats after the fewest codes that fill whole bytes: 8 codes of 3 bits fill 3 bytes, 2 codes of
// 4 bits fill 1. In every such period, the byte at one place is made of the codes at the same places with the same
// shifts.

namespace miniquant::algorithms {
namespace {

struct Period {
  int64_t codes;
  int64_t bytes;
};

Period period_of(int64_t bits) {
  const int64_t shared = std::gcd<int64_t>(bits, 8);
  return {8 / shared, bits / shared};
}

/// [N, n] cut into periods of `length`, the last padded with 0: [N, ceil(n / length), length].
at::Tensor in_periods(const at::Tensor& values, int64_t length) {
  const int64_t missing = (length - values.size(1) % length) % length;
  return at::constant_pad_nd(values, {0, missing}).unflatten(1, {-1, length});
}

/// Interleaves the parts [N, periods], one for each place of a period, to rows of `width`.
at::Tensor rows_of(const std::vector<at::Tensor>& parts, int64_t width) {
  const at::Tensor rows = parts.size() == 1 ? parts.front().contiguous() : at::stack(parts, 2).flatten(1);
  // Not contiguous(): for a single row that is cut it keeps the strides of the longer row.
  return width == rows.size(1) ? rows : rows.narrow(1, 0, width).clone(at::MemoryFormat::Contiguous);
}

}  // namespace

at::Tensor pack(const at::Tensor& codes, int64_t bits) {
  const Period period = period_of(bits);
  const auto mask = static_cast<int64_t>((1U << static_cast<unsigned>(bits)) - 1);
  const at::Tensor fields = at::bitwise_and(in_periods(codes, period.codes).view(at::kByte), mask);
  std::vector<at::Tensor> bytes(static_cast<size_t>(period.bytes));
  for (int64_t i = 0; i < period.codes; ++i) {
    const at::Tensor field = fields.select(2, i);
    const int64_t first_bit = i * bits;
    for (int64_t byte = first_bit / 8; byte <= (first_bit + bits - 1) / 8; ++byte) {
      const int64_t shift = first_bit - byte * 8;
      at::Tensor part = field;
      if (shift != 0) {
        part = shift > 0 ? at::bitwise_left_shift(field, shift) : at::bitwise_right_shift(field, -shift);
      }
      at::Tensor& whole = bytes[static_cast<size_t>(byte)];
      whole = whole.defined() ? at::bitwise_or(whole, part) : part;
    }
  }
  return rows_of(bytes, (codes.size(1) * bits + 7) / 8);
}

at::Tensor unpack(const at::Tensor& packed, int64_t bits, int64_t columns) {
  const Period period = period_of(bits);
  const at::Tensor bytes = in_periods(packed, period.bytes);
  std::vector<at::Tensor> codes(static_cast<size_t>(period.codes));
  for (int64_t i = 0; i < period.codes; ++i) {
    // The code's highest bit becomes the byte's; an arithmetic right shift of the signed byte then extends the sign.
    const int64_t last_bit = i * bits + bits - 1;
    const int64_t above = 7 - last_bit % 8;
    const at::Tensor high = bytes.select(2, last_bit / 8);
    at::Tensor aligned = above == 0 ? high : at::bitwise_left_shift(high, above);
    if (i * bits / 8 != last_bit / 8) {
      aligned = at::bitwise_or(aligned, at::bitwise_right_shift(bytes.select(2, last_bit / 8 - 1), 8 - above));
    }
    codes[static_cast<size_t>(i)] = at::bitwise_right_shift(aligned.view(at::kChar), 8 - bits);
  }
  return rows_of(codes, columns);
}

}  // namespace miniquant::algorithms
