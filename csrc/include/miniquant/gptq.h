#pragma once

#include <ATen/core/Tensor.h>
#include <miniquant/export.h>
#include <miniquant/options.h>

namespace miniquant {

/// GPTQ (Frantar et al. 2022, arXiv:2210.17323, Algorithm 1): quantizes a column at a time and moves what rounding
/// lost onto the columns still to come, so that tr((W - Q) H (W - Q)^T) stays small.
///
/// weight:  [N, K], float32, float64, bfloat16 or float16 (the last two are computed in float32), any strides.
/// hessian: [K, K], float32 or float64, symmetric: X X^T / n of the layer's inputs, without a ridge.
///
/// Works without the inverse of H: with H = R R^T, R upper triangular,
///   target_j = w_j + (sum_{i<j} E_i R_ij) / R_jj,   q_j = quantize(target_j),   E_j = w_j - dequantize(q_j)
/// (see docs/algorithm.md). Codes do not depend on the number of threads nor on `block_size`.
///
/// An input that is always 0 (its row and column of H are 0) has its column rounded to nearest on the final scales.
///
/// H and each row of W may have any scale: a power of four times H, or a power of two times a row, changes no code.
/// row_loss is rounded to its dtype once, to 0 where it is too small for it.
///
/// Throws c10::ValueError / c10::TypeError on bad arguments. Throws c10::LinAlgError where H has a negative diagonal
/// entry or is not positive definite with its ridge; the message names the leading minor, or an input whose diagonal
/// entry is 0 and whose row is not, the ridge used, and a ridge to try.
MINIQUANT_API GptqResult gptq(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options = {});

/// The textbook form of the same: the loop over blocks, groups and columns with the Cholesky factor of H^-1, on ATen
/// operations, for any device. Slow; it is what `gptq` is tested against. Arguments, result and errors as `gptq`,
/// except that it has no ScaleMethod::kLoss, `beam_scales` and `refine`, and that scale methods other than kAbsmax need
/// the CPU.
MINIQUANT_API GptqResult gptq_reference(const at::Tensor& weight, const at::Tensor& hessian,
                                        const GptqOptions& options = {});

}  // namespace miniquant
