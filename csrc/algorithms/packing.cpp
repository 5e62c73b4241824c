#include "algorithms/packing.h"

#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_left_shift.h>
#include <ATen/ops/bitwise_or.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/stack.h>

namespace miniquant::algorithms {

at::Tensor pack_int4(const at::Tensor& codes) {
  const at::Tensor nibbles = at::bitwise_and(at::constant_pad_nd(codes, {0, codes.size(1) % 2}).view(at::kByte), 0x0F);
  const at::Tensor pairs = nibbles.unflatten(1, {-1, 2});
  return at::bitwise_or(pairs.select(2, 0), at::bitwise_left_shift(pairs.select(2, 1), 4));
}

at::Tensor unpack_int4(const at::Tensor& packed, int64_t columns) {
  // A left shift, then an arithmetic right shift of the signed byte, extends the sign of a nibble.
  const at::Tensor low = at::bitwise_right_shift(at::bitwise_left_shift(packed, 4).view(at::kChar), 4);
  const at::Tensor high = at::bitwise_right_shift(packed.view(at::kChar), 4);
  const at::Tensor codes = at::stack({low, high}, 2).flatten(1);
  // Not contiguous(): of an odd last column in a single row it would keep the strides of the longer row.
  return columns == codes.size(1) ? codes : codes.narrow(1, 0, columns).clone(at::MemoryFormat::Contiguous);
}

}  // namespace miniquant::algorithms
