// Every kernel, for the one instruction set that this compilation's flags name. The kernels have internal linkage and
// call nothing inline from the standard library, so that no code compiled for a newer instruction set can be linked in
// place of the same function elsewhere.

#include <cmath>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/kernels.h"
#include "kernels/triangle.h"

namespace miniquant::kernels {
namespace {

#include "kernels/vector.inl"
//
#include "kernels/grid.inl"
#include "kernels/microkernel.inl"
//
#include "kernels/lanes.inl"
//
#include "kernels/cholesky.inl"
#include "kernels/quadratic_form.inl"
#include "kernels/rank_update.inl"
#include "kernels/rtn.inl"
#include "kernels/scale_search.inl"
//
#include "kernels/choices.inl"
//
#include "kernels/sweep_tile.inl"
//
#include "kernels/beam.inl"
//
#include "kernels/sweep.inl"
//
#include "kernels/descent.inl"
//
#include "kernels/refine.inl"

template <typename T>
constexpr TypedKernels<T> kTypedKernels = {
    .tile_rows = kTileRows<T>,
    .compute_grid = compute_grid<T>,
    .search_grid = search_grid<T>,
    .round_to_nearest = round_to_nearest<T>,
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
    .terms_per_product = kTermsPerSum<T>,
    .subtract_products = subtract_products<T>,
    .factor_block = factor_block<T>,
    .solve_block = solve_block<T>,
};

[[maybe_unused]] constexpr InstructionSet baseline = InstructionSet::kBaseline;
[[maybe_unused]] constexpr InstructionSet avx2 = InstructionSet::kAvx2;
[[maybe_unused]] constexpr InstructionSet avx512 = InstructionSet::kAvx512;

}  // namespace

#define MINIQUANT_JOIN_(a, b) a##b
#define MINIQUANT_JOIN(a, b) MINIQUANT_JOIN_(a, b)

extern const KernelTable MINIQUANT_JOIN(kernel_table_, MINIQUANT_KERNEL_ISA);
const KernelTable MINIQUANT_JOIN(kernel_table_, MINIQUANT_KERNEL_ISA) = {
    MINIQUANT_KERNEL_ISA,
    kTypedKernels<float>,
    kTypedKernels<double>,
};

}  // namespace miniquant::kernels
