#pragma once

#include <ATen/core/Tensor.h>
#include <miniquant/export.h>
#include <miniquant/options.h>

namespace miniquant {

/// GPTQ (Frantar et al. 2022, arXiv:2210.17323, Algorithm 1): quantizes one column at a time and updates the columns
/// not yet quantized to compensate for its rounding error, so tr((W - Q) H (W - Q)^T) stays small.
///
/// weight:  [N, K], float32, float64, bfloat16 or float16 (bfloat16 and float16 are computed in float32), any strides.
/// hessian: [K, K], float32 or float64, symmetric: X X^T / n of the layer's inputs X [K, n], without a ridge.
///
/// The inverse of H is not computed. With H = R R^T, R upper triangular,
///   target_j = w_j + (sum_{i<j} E_i R_ij) / R_jj,   q_j = quantize(target_j),   E_j = w_j - dequantize(q_j)
/// (see docs/algorithm.md). Codes depend neither on the number of threads nor on `block_size`.
///
/// The column of an input that is always 0 (its row and column of H are 0) is rounded to nearest on the final scales.
///
/// Codes do not depend on the scale of H or of a row of W: H times a power of four, or a row times a power of two, has
/// the same codes. row_loss is rounded to its dtype once; a value too small for the dtype becomes 0.
///
/// Throws c10::ValueError / c10::TypeError on bad arguments. Throws c10::LinAlgError where H has a negative diagonal
/// entry or is not positive definite with its ridge; the message names the leading minor that is not positive, or an
/// input whose diagonal entry is 0 and whose row is not; the ridge used; and a ridge to try.
MINIQUANT_API GptqResult gptq(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options = {});

/// The textbook form of gptq(): the loop over blocks, groups and columns with the Cholesky factor of H^-1, in ATen
/// operations, for any device. Slow: it is the reference that gptq() is tested against. Arguments, result and errors
/// are those of gptq(), with two limits: ScaleMethod::kLoss, `beam_scales` and `refine` are rejected, and scale methods
/// other than kAbsmax need the CPU.
MINIQUANT_API GptqResult gptq_reference(const at::Tensor& weight, const at::Tensor& hessian,
                                        const GptqOptions& options = {});

}  // namespace miniquant
