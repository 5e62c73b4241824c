// The table of all kernels for one instruction set, the one that this compilation is for: kernels/target-inl.h. Each
// kernel's header includes its parts; start reading at sweep-inl.h.

#include <cstdint>

#include "kernels/cholesky-inl.h"
#include "kernels/dequantize-inl.h"
#include "kernels/descent-inl.h"
#include "kernels/finite-inl.h"
#include "kernels/instruction_set.h"
#include "kernels/kernels.h"
#include "kernels/microkernel-inl.h"
#include "kernels/quadratic_form-inl.h"
#include "kernels/rank_update-inl.h"
#include "kernels/refine-inl.h"
#include "kernels/rtn-inl.h"
#include "kernels/scale_search-inl.h"
#include "kernels/sweep-inl.h"
#include "kernels/symmetric-inl.h"
#include "kernels/target-inl.h"
#include "kernels/vector-inl.h"

namespace miniquant::kernels {
namespace MINIQUANT_KERNEL_ISA {
namespace {

template <typename T>
constexpr TypedKernels<T> kTypedKernels = {
    .tile_rows = kTileRows<T>,
    .largest_magnitudes = largest_magnitudes<T>,
    .compute_grid = compute_grid<T>,
    .search_grid = search_grid<T>,
    .round_to_nearest = round_to_nearest<T>,
    .dequantize = dequantize<T, T>,
    .sweep_workspace = sweep_workspace<T>,
    .sweep = sweep<T>,
    .descent_workspace = descent_workspace<T>,
    .descend = descend<T>,
    .refine_workspace = refine_workspace<T>,
    .refine = refine<T>,
    .quadratic_form_workspace = quadratic_form_workspace<T>,
    .quadratic_form = quadratic_form<T>,
    .pack_tile = pack_tile<T>,
    .rank_update = rank_update<T>,
    .product_update = product_update<T>,
    .survey_symmetry = survey_symmetry<T>,
    .average_square_as_f32 = average_square<T, float>,
    .average_square_as_f64 = average_square<T, double>,
    .transpose = transpose<T>,
    .terms_per_product = kTermsPerSum<T>,
    .subtract_products = subtract_products<T>,
    .factor_block = factor_block<T>,
    .solve_block = solve_block<T>,
};

}  // namespace
}  // namespace MINIQUANT_KERNEL_ISA

namespace {
namespace named {

#define MINIQUANT_NAMED(name, enumerator, supported) \
  [[maybe_unused]] constexpr InstructionSet name = InstructionSet::enumerator;
MINIQUANT_FOR_EACH_INSTRUCTION_SET(MINIQUANT_NAMED)
#undef MINIQUANT_NAMED

}  // namespace named
}  // namespace

#define MINIQUANT_JOIN_(a, b) a##b
#define MINIQUANT_JOIN(a, b) MINIQUANT_JOIN_(a, b)

extern const KernelTable MINIQUANT_JOIN(kernel_table_, MINIQUANT_KERNEL_ISA);
const KernelTable MINIQUANT_JOIN(kernel_table_, MINIQUANT_KERNEL_ISA) = {
    named::MINIQUANT_KERNEL_ISA,
    MINIQUANT_KERNEL_ISA::kTypedKernels<float>,
    MINIQUANT_KERNEL_ISA::kTypedKernels<double>,
    MINIQUANT_KERNEL_ISA::dequantize<float, std::uint16_t>,
    MINIQUANT_KERNEL_ISA::largest_magnitude_bits<std::int16_t>,
    MINIQUANT_KERNEL_ISA::largest_magnitude_bits<std::int32_t>,
    MINIQUANT_KERNEL_ISA::largest_magnitude_bits<std::int64_t>,
};

}  // namespace miniquant::kernels
