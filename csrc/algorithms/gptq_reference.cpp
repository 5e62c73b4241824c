// GPTQ as the paper writes it (Frantar et al. 2022, arXiv:2210.17323, Algorithm 1), in plain ATen operations.
//
// W [N, K] is cut along K into blocks of B columns, each block into groups of G columns that share their qparams (scale
// and zero point), and columns are quantized one after the other:
//
//          K columns
//        +---------------------+---------------------+-----+
//        |         B1          |         B2          | ... |
//   N    |   G1    |    G2     |   G3    |    G4     |     |      Hinv [K, K], upper triangular:
//   rows |  k ->   |           |         |           |     |      Hinv^T Hinv = H^-1
//        +---------------------+---------------------+-----+
//
//   for each block      B_cur = W[:, B_cur_k_start:B_cur_k_end]                                  [N, B]
//                       Hinv_cur = Hinv[B_cur_k_start:B_cur_k_end, B_cur_k_start:B_cur_k_end]    [B, B]
//     for each group    [G_k_start, G_k_end) of the block
//                       qparams = those of the group; with dynamic scales taken here, from the updated weights
//       for each column k in [G_k_start - B_cur_k_start, G_k_end - B_cur_k_start)                local to the block
//                       w_t  = B_cur[:, k]                                                       [N]
//                       w_t_qdq = dequantize(quantize(w_t, qparams), qparams)                    [N]
//                       err1 = (w_t - w_t_qdq) / Hinv_cur[k, k]                                  [N]
//                       B_cur[:, k:]    -= outer(err1, Hinv_cur[k, k:])                          the rest of the block
//                       B_cur_Err1[:, k] = err1                                                  [N, B]
//     W[:, B_cur_k_end:] -= B_cur_Err1 @ Hinv[B_cur_k_start:B_cur_k_end, B_cur_k_end:]           the later blocks
//
// A group may cross the border of two blocks; the loop then meets it once in each. In activation order W and H are
// permuted first, and a "group" of the loop is a run of columns that are stored in one group.

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_inv_ex.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/round.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "algorithms/column_order.h"
#include "algorithms/damping.h"
#include "algorithms/gptq.h"
#include "algorithms/grid.h"
#include "algorithms/row_loss.h"

namespace miniquant::algorithms {
namespace {

/// Scale and zero point of one group for every row, [N] each, in the compute dtype.
struct QParams {
  at::Tensor scale;
  at::Tensor zero_point;
};

at::Tensor quantize(const at::Tensor& w_t, const QParams& qparams, const kernels::CodeRange& range) {
  return at::clamp(at::round(w_t / qparams.scale) + qparams.zero_point, range.code_min, range.code_max);
}

at::Tensor dequantize(const at::Tensor& code, const QParams& qparams) {
  return (code - qparams.zero_point) * qparams.scale;
}

/// Positive scales [N], in units of the rows, rounded as they are stored: never to 0, and never to a scale of which
/// `levels` [N] multiples are not finite.
at::Tensor stored(const at::Tensor& scale, const at::Tensor& levels, const Grid& grid) {
  const auto dtype = scale.scalar_type();
  const at::Tensor unit = grid.units.defined() ? grid.units : at::ones_like(scale);
  const int32_t most = grid.range.code_max - grid.range.code_min;
  std::vector<double> largest(most + 1);
  for (int32_t count = 1; count <= most; ++count) {
    largest[count] = largest_scale(grid.stored, count);
  }
  const at::Tensor rounded = (scale * unit).to(grid.stored).to(dtype).clamp_min(smallest_scale(grid.stored));
  const at::Tensor limit = at::tensor(largest, levels.options().dtype(at::kDouble)).to(dtype).index_select(0, levels);
  return at::minimum(rounded, limit) / unit;
}

/// The grid of a group [N, G] from its smallest and largest weight.
QParams choose_qparams(const at::Tensor& group, const Grid& grid) {
  if (grid.range.symmetric) {
    const at::Tensor largest = group.abs().amax(1);
    const at::Tensor levels = at::full_like(largest, -grid.range.code_min, largest.options().dtype(at::kLong));
    at::Tensor scale = stored(largest / -grid.range.code_min, levels, grid);
    if (-grid.range.code_min > grid.range.code_max) {
      // The side with one more code is that of the largest weight.
      scale = at::where(group.amax(1) > -group.amin(1), -scale, scale);
    }
    return {at::where(largest == 0, at::ones_like(scale), scale), at::zeros_like(scale)};
  }
  const at::Tensor lowest = group.amin(1).clamp_max(0);
  const at::Tensor highest = group.amax(1).clamp_min(0);
  const int32_t steps = grid.range.code_max - grid.range.code_min;
  const at::Tensor all_zero = lowest == highest;
  const auto offset_with = [&](const at::Tensor& scale) { return at::clamp(at::round(-lowest / scale), 0, steps); };
  // The largest distance of a code from the zero point, which lies `offset` above the smallest code.
  const auto levels_beside = [&](const at::Tensor& offset) {
    return at::maximum(offset, steps - offset).to(at::kLong);
  };
  const at::Tensor exact = at::where(all_zero, at::ones_like(lowest), (highest * 0.5 - lowest * 0.5) / (steps * 0.5));
  at::Tensor levels = levels_beside(offset_with(exact));
  levels = at::maximum(levels, levels_beside(offset_with(stored(exact, levels, grid))));
  const at::Tensor scale = at::where(all_zero, at::ones_like(exact), stored(exact, levels, grid));
  return {scale, at::where(all_zero, at::zeros_like(scale), grid.range.code_min + offset_with(scale))};
}

/// The upper triangular factor Hinv of H^-1; nullopt where H is not positive definite.
std::optional<at::Tensor> inverse_factor(const at::Tensor& H) {
  if (std::get<1>(at::linalg_cholesky_ex(H)).item<int64_t>() != 0) {
    return std::nullopt;
  }
  const auto [inverse, singular] = at::linalg_inv_ex(H);
  const auto [factor, info] = at::linalg_cholesky_ex(inverse, /*upper=*/true);
  return singular.item<int64_t>() == 0 && info.item<int64_t>() == 0 ? std::optional(factor) : std::nullopt;
}

/// The end of the run of columns, from k on and before `end`, that are stored in one group.
int64_t end_of_group(const std::vector<int64_t>& group_of_column, int64_t k, int64_t end) {
  int64_t run_end = k + 1;
  while (run_end < end && group_of_column[run_end] == group_of_column[k]) {
    ++run_end;
  }
  return run_end;
}

}  // namespace

GptqResult gptq_reference(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options) {
  const at::ScalarType dtype = compute_dtype(weight.scalar_type());
  const int64_t K = weight.size(1);
  const at::Tensor column = order_of_columns(hessian, options.column_order, options.group_size);
  const Damping damping = damping_of(hessian, options.ridge);
  check_dead_inputs("gptq_reference", hessian, damping);
  const at::Tensor damped = damped_matrix(hessian, damping, dtype).index_select(0, column).index_select(1, column);
  at::Tensor H = damped.clone();
  H.diagonal().masked_fill_(damped_diagonal(hessian, damping).index_select(0, column) == 0, 1);  // dead, no ridge
  const std::optional<at::Tensor> factor = inverse_factor(H);
  if (!factor.has_value()) {
    throw_not_positive_definite("gptq_reference", hessian, damping);
  }
  const at::Tensor& Hinv = *factor;
  const ScaledWeight scaled = scaled_weight(weight, options.scales);
  const at::Tensor original = scaled.values.index_select(1, column);
  at::Tensor W = original.clone();

  Grid grid = make_grid(weight, options, scaled.units);
  const bool dynamic_scales = options.group_scales == GroupScales::kDynamic;
  if (!dynamic_scales && options.scale_method != ScaleMethod::kAbsmax) {
    hold_dead_inputs(dead_inputs(hessian), scaled.values, grid);
    compute_scales(grid, scaled.values, options.scale_method, damped_diagonal(hessian, damping));
  }
  at::Tensor scales = grid.scales;
  at::Tensor zero_points = grid.zero_points.to(dtype);
  const auto store_qparams = [&](int64_t group, const QParams& qparams) {
    scales.select(1, group).copy_(qparams.scale);
    zero_points.select(1, group).copy_(qparams.zero_point);
  };
  if (!dynamic_scales && !options.scales.has_value() && options.scale_method == ScaleMethod::kAbsmax) {
    for (int64_t group = 0; group < scales.size(1); ++group) {
      const int64_t begin = group * grid.group_size;
      store_qparams(group, choose_qparams(scaled.values.slice(1, begin, begin + grid.group_size), grid));
    }
  }
  const at::Tensor column_on_cpu = column.cpu();
  std::vector<int64_t> group_of_column(K);
  for (int64_t k = 0; k < K; ++k) {
    group_of_column[k] = column_on_cpu.const_data_ptr<int64_t>()[k] / grid.group_size;
  }

  at::Tensor Q = at::empty_like(W);
  at::Tensor codes = at::empty_like(W);
  for (int64_t B_cur_k_start = 0; B_cur_k_start < K;) {
    const int64_t B_cur_k_end = B_cur_k_start + std::min(options.block_size, K - B_cur_k_start);
    at::Tensor B_cur = W.slice(1, B_cur_k_start, B_cur_k_end);
    at::Tensor B_cur_Err1 = at::zeros_like(B_cur);
    const at::Tensor Hinv_rows = Hinv.slice(0, B_cur_k_start, B_cur_k_end);
    const at::Tensor Hinv_cur = Hinv_rows.slice(1, B_cur_k_start, B_cur_k_end);

    for (int64_t G_k_start = B_cur_k_start; G_k_start < B_cur_k_end;) {
      const int64_t G_k_end = end_of_group(group_of_column, G_k_start, B_cur_k_end);
      const int64_t group = group_of_column[G_k_start];
      if (dynamic_scales && G_k_start % grid.group_size == 0) {
        // The part of the group in later blocks has not received this block's errors yet.
        const int64_t group_end = std::min(G_k_start + grid.group_size, K);
        at::Tensor updated = W.slice(1, G_k_start, group_end).clone();
        const int64_t in_block = B_cur_k_end - G_k_start;
        if (in_block < group_end - G_k_start) {
          updated.slice(1, in_block) -= B_cur_Err1.matmul(Hinv_rows.slice(1, B_cur_k_end, group_end));
        }
        store_qparams(group, choose_qparams(updated, grid));
      }
      const QParams qparams{scales.select(1, group), zero_points.select(1, group)};

      for (int64_t k = G_k_start - B_cur_k_start; k < G_k_end - B_cur_k_start; ++k) {
        const at::Tensor w_t = B_cur.select(1, k).clone();
        const at::Tensor code = quantize(w_t, qparams, grid.range);
        const at::Tensor w_t_qdq = dequantize(code, qparams);
        const at::Tensor err1 = (w_t - w_t_qdq) / Hinv_cur.select(0, k).select(0, k);
        B_cur.slice(1, k) -= at::outer(err1, Hinv_cur.select(0, k).slice(0, k));
        B_cur_Err1.select(1, k).copy_(err1);
        codes.select(1, B_cur_k_start + k).copy_(code);
        Q.select(1, B_cur_k_start + k).copy_(w_t_qdq);
      }
      G_k_start = G_k_end;
    }
    W.slice(1, B_cur_k_end) -= B_cur_Err1.matmul(Hinv_rows.slice(1, B_cur_k_end));
    B_cur_k_start = B_cur_k_end;
  }

  const at::Tensor E = original - Q;
  const at::Tensor row_loss = (E.matmul(damped) * E).sum(1).clamp_min(0);  // only rounding makes it negative
  grid.codes.index_copy_(1, column, codes.to(at::kChar));
  const QuantizationGrid& kind = options;
  return {{kind, grid.codes, grid.stored_scales(), zero_points.to(at::kChar)},
          in_true_units(row_loss, scaled, damping)};
}

}  // namespace miniquant::algorithms
