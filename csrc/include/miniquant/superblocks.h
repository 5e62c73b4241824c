#pragma once

#include <ATen/core/Tensor.h>
#include <miniquant/export.h>
#include <miniquant/options.h>

// Two-level grids: the K types of GGUF, which llama.cpp reads. Groups of 16 or 32 columns; 256 columns, a superblock,
// share a step of which their scales are whole multiples.

namespace miniquant {

/// rtn() on the grid of a type, with scales for each group's range, then rounded to multiples.
///
/// weight: [N, K], as of rtn(), K a multiple of 256.
/// Throws as rtn() does.
MINIQUANT_API SuperblockWeight rtn_superblocks(const at::Tensor& weight, SuperblockType type);

/// gptq() on the grid of a type. A first sweep chooses scales of any size as `options` say. The step of a superblock is
/// the one of least squared error of these scales, weighted by z H z^T without what columns have in common (z: codes -
/// zero point). A second sweep, with scales and minima rounded to multiples of the steps, chooses codes. Its refinement
/// moves codes, scales and minima, never the steps.
///
/// weight, hessian: as of gptq(), K a multiple of 256.
/// options: those of the grid (bits to zero_points, full_range and scale_dtype) are not read: the type has them.
/// Throws as gptq() does.
MINIQUANT_API SuperblockResult gptq_superblocks(const at::Tensor& weight, const at::Tensor& hessian,
                                                SuperblockType type, const GptqOptions& options = {});

/// Returns (codes - zero_points) * scales - minima, [N, K] float32, each column with those of its group: what llama.cpp
/// computes.
MINIQUANT_API at::Tensor dequantize(const SuperblockWeight& quantized);

}  // namespace miniquant
