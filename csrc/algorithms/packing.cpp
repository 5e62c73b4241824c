#include "algorithms/packing.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_left_shift.h>
#include <ATen/ops/bitwise_or.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "algorithms/dispatch.h"
#include "algorithms/parallel.h"
#include "kernels/arithmetic.h"

namespace miniquant::algorithms {
namespace {

// On the CPU a word of 64 bits holds eight codes, one per byte, and three steps move them together or apart: two bytes'
// fields to one field of 16 bits, two of these to one of 32, two of these to one of 64. The first code has the lowest
// bits.

/// Codes in one word.
constexpr int64_t kCodes = 8;
constexpr unsigned kWordBits = 64;

/// The lowest `width` bits of every field of `field` bits.
constexpr uint64_t lowest_of_fields(unsigned width, unsigned field) {
  uint64_t all = 0;
  for (unsigned at = 0; at < kWordBits; at += field) {
    all |= ((uint64_t{1} << width) - 1) << at;
  }
  return all;
}

/// The lowest kBits bits of eight bytes, without gaps.
template <unsigned kBits>
uint64_t moved_together(uint64_t bytes) {
  uint64_t word = bytes & lowest_of_fields(kBits, 8);
  for (unsigned step = 1; step < kCodes; step *= 2) {
    const unsigned width = kBits * step;
    const uint64_t even = lowest_of_fields(width, 16 * step);
    word = (word & even) | ((word >> (8 * step - width)) & (even << width));
  }
  return word;
}

/// The inverse: bytes whose higher bits are copies of a field's highest one.
template <unsigned kBits>
uint64_t moved_apart(uint64_t word) {
  for (unsigned step = kCodes / 2; step > 0; step /= 2) {
    const unsigned width = kBits * step;
    const uint64_t even = lowest_of_fields(width, 16 * step);
    word = (word & even) | ((word & (even << width)) << (8 * step - width));
  }
  // A sign bit times this sets the bits above it, all within its byte.
  constexpr uint64_t kAbove = (uint64_t{1} << (9 - kBits)) - 2;
  const uint64_t signs = word & (lowest_of_fields(1, 8) << (kBits - 1));
  return word | (signs * kAbove);
}

template <unsigned kBits>
void pack_row(const int8_t* codes, int64_t columns, uint8_t* packed) {
  const int64_t whole = columns / kCodes;
  const auto rest = static_cast<size_t>(columns % kCodes);
  uint64_t word = 0;
  for (int64_t i = 0; i < whole; ++i) {
    std::memcpy(&word, codes + i * kCodes, sizeof(word));
    word = moved_together<kBits>(word);
    std::memcpy(packed + i * kBits, &word, kBits);
  }
  if (rest > 0) {
    word = 0;
    std::memcpy(&word, codes + whole * kCodes, rest);
    word = moved_together<kBits>(word);
    std::memcpy(packed + whole * kBits, &word, (rest * kBits + 7) / 8);
  }
}

template <unsigned kBits>
void unpack_row(const uint8_t* packed, int64_t columns, int8_t* codes) {
  const int64_t whole = columns / kCodes;
  const auto rest = static_cast<size_t>(columns % kCodes);
  uint64_t word = 0;
  for (int64_t i = 0; i < whole; ++i) {
    std::memcpy(&word, packed + i * kBits, kBits);
    const uint64_t bytes = moved_apart<kBits>(word);
    std::memcpy(codes + i * kCodes, &bytes, sizeof(bytes));
  }
  if (rest > 0) {
    word = 0;
    std::memcpy(&word, packed + whole * kBits, (rest * kBits + 7) / 8);
    const uint64_t bytes = moved_apart<kBits>(word);
    std::memcpy(codes + whole * kCodes, &bytes, rest);
  }
}

/// body.operator()<kBits>() for that number of bits.
template <typename Body>
void for_width(int64_t bits, const Body& body) {
  switch (bits) {
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    case 4:
      return body.template operator()<4>();
    case 5:
      return body.template operator()<5>();
    case 6:
      return body.template operator()<6>();
    case 7:
      return body.template operator()<7>();
    default:
      TORCH_INTERNAL_ASSERT(bits == 8, "not a width of codes: ", bits);
      return body.template operator()<8>();
  }
}

/// body(row) for all rows, in parallel.
template <typename Body>
void for_rows(int64_t rows, int64_t columns, const Body& body) {
  for_row_tiles(rows, 1, kOperationsPerEntryRead * columns, [&](int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; ++row) {
      body(row);
    }
  });
}

/// Codes in one piece of work.
constexpr int64_t kCodesPerPiece = 65'536;

/// The bits of all codes that lie above the lowest `bits`, once the smallest code is moved to 0.
uint8_t bits_above(const int8_t* codes, int64_t count, int64_t bits) {
  const auto half = static_cast<uint8_t>(1U << static_cast<unsigned>(bits - 1));
  uint8_t all = 0;
  for (int64_t i = 0; i < count; ++i) {
    all |= static_cast<uint8_t>(static_cast<uint8_t>(codes[i]) + half);
  }
  return static_cast<uint8_t>(all >> static_cast<unsigned>(bits));
}

int64_t packed_columns(int64_t columns, int64_t bits) { return kernels::ceil_div(columns * bits, 8); }

// In PyTorch's operations: the layout of a row repeats after the fewest codes that fill whole bytes: 8 codes of 3 bits
// fill 3 bytes, 2 codes of 4 bits fill 1. In every such period, the byte at one place is made of the codes at the same
// places with the same shifts.

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

at::Tensor pack(const at::Tensor& given, int64_t bits) {
  if (!given.is_cpu()) {
    return pack_by_operations(given, bits);
  }
  const at::Tensor codes = given.contiguous();
  const int64_t columns = codes.size(1);
  const int64_t width = packed_columns(columns, bits);
  const at::Tensor packed = at::empty({codes.size(0), width}, codes.options().dtype(at::kByte));
  const auto* const from = codes.const_data_ptr<int8_t>();
  auto* const to = packed.mutable_data_ptr<uint8_t>();
  for_width(bits, [&]<unsigned kBits> {
    for_rows(codes.size(0), columns,
             [&](int64_t row) { pack_row<kBits>(from + row * columns, columns, to + row * width); });
  });
  return packed;
}

at::Tensor unpack(const at::Tensor& given, int64_t bits, int64_t columns) {
  if (!given.is_cpu()) {
    return unpack_by_operations(given, bits, columns);
  }
  const at::Tensor packed = given.contiguous();
  const int64_t width = packed_columns(columns, bits);
  const at::Tensor codes = at::empty({packed.size(0), columns}, packed.options().dtype(at::kChar));
  const auto* const from = packed.const_data_ptr<uint8_t>();
  auto* const to = codes.mutable_data_ptr<int8_t>();
  for_width(bits, [&]<unsigned kBits> {
    for_rows(packed.size(0), columns,
             [&](int64_t row) { unpack_row<kBits>(from + row * width, columns, to + row * columns); });
  });
  return codes;
}

bool fit_in(const at::Tensor& given, int64_t bits) {
  if (!given.is_cpu()) {
    const auto half = static_cast<int64_t>(uint64_t{1} << static_cast<unsigned>(bits - 1));
    return !(given < -half).logical_or(given >= half).any().item<bool>();
  }
  const at::Tensor codes = given.contiguous();
  const int64_t count = codes.numel();
  const auto* const values = codes.const_data_ptr<int8_t>();
  std::atomic<bool> fit = true;
  for_pieces(kernels::ceil_div(count, kCodesPerPiece), kOperationsPerEntryRead * count, [&](int64_t piece) {
    const int64_t begin = piece * kCodesPerPiece;
    if (bits_above(values + begin, std::min(kCodesPerPiece, count - begin), bits) != 0) {
      fit.store(false, std::memory_order_relaxed);
    }
  });
  return fit.load(std::memory_order_relaxed);
}

at::Tensor pack_by_operations(const at::Tensor& codes, int64_t bits) {
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
  return rows_of(bytes, packed_columns(codes.size(1), bits));
}

at::Tensor unpack_by_operations(const at::Tensor& packed, int64_t bits, int64_t columns) {
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
