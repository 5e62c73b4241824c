// The kernels of kernels/bf16.h for one unit, the one that this compilation is for: MINIQUANT_BF16_HEADER.

#include <cstdint>

#include "kernels/bf16.h"
#include "kernels/bf16_pack-inl.h"
#include "kernels/bf16_products-inl.h"
#include "kernels/target-inl.h"

#define MINIQUANT_JOIN_(a, b) a##b
#define MINIQUANT_JOIN(a, b) MINIQUANT_JOIN_(a, b)
#define MINIQUANT_TEXT_(a) #a
#define MINIQUANT_TEXT(a) MINIQUANT_TEXT_(a)

namespace miniquant::kernels {

extern const Bf16Kernels MINIQUANT_JOIN(bf16_kernels_, MINIQUANT_KERNEL_ISA);
const Bf16Kernels MINIQUANT_JOIN(bf16_kernels_, MINIQUANT_KERNEL_ISA) = {
    .name = MINIQUANT_TEXT(MINIQUANT_KERNEL_ISA),
    .most_products = MINIQUANT_KERNEL_ISA::Bf16Multiplier::kMostProducts,
    .most_packed_bytes = MINIQUANT_KERNEL_ISA::Bf16Multiplier::kMostPackedBytes,
    .most_square_panels = MINIQUANT_KERNEL_ISA::Bf16Multiplier::kMostSquarePanels,
    .pack_bf16 = MINIQUANT_KERNEL_ISA::pack_tokens<std::uint16_t>,
    .pack_f32 = MINIQUANT_KERNEL_ISA::pack_tokens<float>,
    .add_square = MINIQUANT_KERNEL_ISA::add_square,
    .add_mirrored = MINIQUANT_KERNEL_ISA::add_mirrored,
};

}  // namespace miniquant::kernels
