// Grids with two levels of scales. The groups' scales are found as on any grid; here they become multiples of a step
// that a superblock shares. The refinement that keeps them multiples is in kernels/refine-inl.h.

#include "algorithms/superblocks.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Half.h>
#include <c10/util/TypeCast.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>

#include "algorithms/damping.h"
#include "algorithms/dispatch.h"
#include "algorithms/gptq.h"
#include "algorithms/grid.h"
#include "algorithms/sweep.h"

namespace miniquant::algorithms {
namespace {

/// The multiples of a step that a value may be.
struct Multiples {
  int32_t lowest;
  int32_t highest;
};

Multiples multiples_of_scales(SuperblockType type) {
  switch (type) {
    case SuperblockType::kQ2K:
      return {1, 15};
    case SuperblockType::kQ3K:
      return {-32, 31};
    case SuperblockType::kQ6K:
      return {-128, 127};
    default:
      return {1, 63};
  }
}

/// A step in float16: not 0, and finite.
double stored_step(double step) {
  constexpr double kLargest = 65504;
  const double magnitude = std::clamp(std::abs(step), smallest_scale(at::kHalf), kLargest);
  const auto rounded = static_cast<double>(static_cast<float>(c10::convert<c10::Half>(static_cast<float>(magnitude))));
  return step < 0 ? -rounded : rounded;
}

/// The multiple of `step` nearest to `value`, or the next larger one where it may not fall short. A scale is not 0.
double nearest_multiple(double value, double step, Multiples range, bool falls_short, bool may_be_zero) {
  const double exact = value / step;
  double multiple = falls_short ? std::nearbyint(exact) : std::copysign(std::ceil(std::abs(exact)), exact);
  if (multiple == 0 && !may_be_zero) {
    multiple = exact < 0 ? -1 : 1;
  }
  return std::clamp(multiple, static_cast<double>(range.lowest), static_cast<double>(range.highest));
}

/// Values of all groups, what they count, and whether they may be rounded towards 0.
template <typename T>
struct GroupValues {
  T* values;
  const double* importance;
  const T* held;  ///< GridView::held, or null
};

/// The step of least importance-weighted squared error for the values of a superblock's `count` groups, of those that
/// take the largest value near an end of the range.
template <typename T>
double step_of_superblock(const T* values, const double* importance, int64_t count, double unit, Multiples range,
                          bool may_be_zero) {
  constexpr int kFirst = 44;  // of factors of 1/64: steps from 0.69 to 1.2 times that with which nothing is clipped
  constexpr int kLast = 77;
  double largest = 0;
  for (int64_t g = 0; g < count; ++g) {
    largest = importance[g] > 0 ? std::max(largest, std::abs(static_cast<double>(values[g]))) : largest;
  }
  if (largest == 0) {
    return may_be_zero ? 0 : 1;
  }
  const bool has_signs = range.lowest < 0;
  const double whole = largest * unit / static_cast<double>(has_signs ? -range.lowest : range.highest);
  double best = 0;
  double least = 0;
  for (const double sign : {1.0, -1.0}) {
    if (sign < 0 && !has_signs) {
      continue;
    }
    for (int factor = kFirst; factor <= kLast; ++factor) {
      const double step = stored_step(sign * whole * factor / 64);
      double error = 0;
      for (int64_t g = 0; g < count; ++g) {
        const double value = static_cast<double>(values[g]) * unit;
        const double moved = nearest_multiple(value, step, range, true, may_be_zero) * step - value;
        error += importance[g] * moved * moved;
      }
      if (best == 0 || error < least) {
        best = step;
        least = error;
      }
    }
  }
  return best;
}

/// Rounds values [N, groups] (units of the row) to multiples of a step of their superblock. Sets `steps` [N, groups]
/// (units of the row) and `stored` [N, superblocks] (float16).
template <typename T>
void round_to_steps(GroupValues<T> of, Multiples range, bool may_be_zero, int64_t groups, int64_t groups_per_block,
                    const T* units, int64_t row_begin, int64_t row_end, T* steps, c10::Half* stored) {
  const int64_t blocks = groups / groups_per_block;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const double unit = units == nullptr ? 1.0 : static_cast<double>(units[row]);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = row * groups + block * groups_per_block;
      const double step =
          step_of_superblock(of.values + first, of.importance + first, groups_per_block, unit, range, may_be_zero);
      stored[row * blocks + block] = c10::convert<c10::Half>(static_cast<float>(step));
      for (int64_t at = first; at < first + groups_per_block; ++at) {
        steps[at] = static_cast<T>(step / unit);
        const bool is_held = of.held != nullptr && (of.held[2 * at] != 0 || of.held[2 * at + 1] != 0);
        const double value = static_cast<double>(of.values[at]) * unit;
        const double multiple = step == 0 ? 0 : nearest_multiple(value, step, range, !is_held, may_be_zero);
        of.values[at] = static_cast<T>(multiple * step / unit);
      }
    }
  }
}

/// What errors of a row's scales and minima count: sums over a group's columns of d_j z_j^2 and of d_j, with d the
/// diagonal of the Hessian and z the levels; 0 where all weights are 0. Sets minima, too: those that zero points mean.
template <typename T>
void set_minima_and_importance(const Grid& grid, const at::Tensor& weight, const at::Tensor& diagonal,
                               const at::Tensor& minima, const at::Tensor& of_scales, const at::Tensor& of_minima,
                               int64_t row_begin, int64_t row_end) {
  const int64_t columns = weight.size(1);
  const int64_t groups = grid.scales.size(1);
  const T* const values = weight.const_data_ptr<T>();
  const auto* const d = diagonal.const_data_ptr<double>();
  const auto* const codes = grid.codes.const_data_ptr<int8_t>();
  const auto* const zero_points = grid.zero_points.const_data_ptr<int8_t>();
  const T* const scales = grid.scales.const_data_ptr<T>();
  T* const to_minima = minima.mutable_data_ptr<T>();
  auto* const scale_counts = of_scales.mutable_data_ptr<double>();
  auto* const minimum_counts = of_minima.mutable_data_ptr<double>();
  const int32_t lowest = grid.range.symmetric ? 0 : grid.range.code_min;
  for (int64_t at = row_begin * groups; at < row_end * groups; ++at) {
    const int64_t begin = at / groups * columns + at % groups * grid.group_size;
    bool is_zero = true;
    double squares = 0;
    double sum = 0;
    for (int64_t i = begin; i < begin + grid.group_size; ++i) {
      const double level = codes[i] - lowest;
      is_zero = is_zero && values[i] == 0;
      squares += d[i % columns] * level * level;
      sum += d[i % columns];
    }
    scale_counts[at] = is_zero ? 0 : squares;
    minimum_counts[at] = is_zero ? 0 : sum;
    const auto offset = static_cast<T>(grid.range.symmetric ? 0 : zero_points[at] - lowest);
    to_minima[at] = is_zero ? T(0) : scales[at] * offset;
  }
}

/// The float16 steps of a weight.
struct Supers {
  at::Tensor scales;
  at::Tensor minima;
};

/// Gives a quantized weight scales, and minima in place of zero points, that are multiples of steps. weight: [N, K],
/// ScaledWeight::values. diagonal: float64 [K]: what errors of the columns count.
Supers round_to_superblocks(SuperblockType type, const at::Tensor& weight, const at::Tensor& diagonal, Grid& grid) {
  const int64_t rows = weight.size(0);
  const int64_t groups = grid.scales.size(1);
  const int64_t per_block = kSuperblockColumns / grid.group_size;
  const Multiples range = multiples_of_scales(type);
  const bool has_minima = !grid.range.symmetric;
  const auto halves = weight.options().dtype(at::kHalf);
  const auto doubles = weight.options().dtype(at::kDouble);
  const Supers supers{at::zeros({rows, groups / per_block}, halves), at::zeros({rows, groups / per_block}, halves)};
  const at::Tensor minima = at::empty_like(grid.scales);
  const at::Tensor of_scales = at::empty({rows, groups}, doubles);
  const at::Tensor of_minima = at::empty({rows, groups}, doubles);
  const at::Tensor steps = at::empty_like(grid.scales);
  const at::Tensor minimum_steps = at::empty_like(grid.scales);
  dispatch_compute(weight.scalar_type(), [&]<typename T> {
    const auto grid_view = view<T>(grid);
    for_row_tiles(rows, 1, weight.size(1) * 8, [&](int64_t row_begin, int64_t row_end) {
      set_minima_and_importance<T>(grid, weight, diagonal, minima, of_scales, of_minima, row_begin, row_end);
      round_to_steps<T>({grid_view.scales, of_scales.const_data_ptr<double>(), grid_view.held}, range, false, groups,
                        per_block, grid_view.units, row_begin, row_end, steps.mutable_data_ptr<T>(),
                        supers.scales.mutable_data_ptr<c10::Half>());
      if (has_minima) {
        round_to_steps<T>({minima.mutable_data_ptr<T>(), of_minima.const_data_ptr<double>(), grid_view.held},
                          {0, range.highest}, true, groups, per_block, grid_view.units, row_begin, row_end,
                          minimum_steps.mutable_data_ptr<T>(), supers.minima.mutable_data_ptr<c10::Half>());
      }
    });
  });
  grid.steps = {.scales = steps,
                .minimums = has_minima ? minimum_steps : at::Tensor(),
                .minima = has_minima ? minima : at::Tensor(),
                .lowest = range.lowest,
                .highest = range.highest};
  if (has_minima) {
    grid.zero_points.fill_(grid.range.code_min);
  }
  return supers;
}

SuperblockWeight finished(const QuantizationGrid& kind, const Grid& grid, const Supers& supers) {
  at::Tensor minima = grid.steps.minima.defined() ? grid.steps.minima : at::zeros_like(grid.scales);
  if (grid.units.defined()) {
    minima = minima * grid.units.unsqueeze(1);
  }
  return {
      {kind, grid.codes, grid.stored_scales(), grid.zero_points}, minima.to(at::kFloat), supers.scales, supers.minima};
}

}  // namespace

QuantizationGrid grid_of(SuperblockType type) {
  switch (type) {
    case SuperblockType::kQ2K:
      return {.bits = 2, .group_size = 16, .symmetric = false};
    case SuperblockType::kQ3K:
      return {.bits = 3, .group_size = 16, .symmetric = true, .full_range = true};
    case SuperblockType::kQ4K:
      return {.bits = 4, .group_size = 32, .symmetric = false};
    case SuperblockType::kQ5K:
      return {.bits = 5, .group_size = 32, .symmetric = false};
    case SuperblockType::kQ6K:
      break;
  }
  return {.bits = 6, .group_size = 16, .symmetric = true, .full_range = true};
}

SuperblockWeight rtn_superblocks(const at::Tensor& weight, SuperblockType type) {
  const QuantizationGrid kind = grid_of(type);
  GridOptions options{kind};
  options.scale_dtype = at::kFloat;
  const ScaledWeight scaled = scaled_weight(weight, std::nullopt);
  const at::Tensor& values = scaled.values;
  Grid grid = make_grid(weight, options, scaled.units);
  const auto round = [&](const at::Tensor& rounded) {
    dispatch_compute(values.scalar_type(), [&]<typename T> {
      const auto grid_view = view<T>(grid);
      for_row_tiles(values.size(0), typed_kernels<T>().tile_rows, 8 * values.size(1), [&](int64_t begin, int64_t end) {
        typed_kernels<T>().round_to_nearest(grid_view, rounded.const_data_ptr<T>(), values.size(1), begin, end);
      });
    });
  };
  compute_scales(grid, values, ScaleMethod::kAbsmax);
  round(values);
  const at::Tensor alike = at::ones({values.size(1)}, values.options().dtype(at::kDouble));
  const Supers supers = round_to_superblocks(type, values, alike, grid);
  round(with_minima(values, grid));
  return finished(kind, grid, supers);
}

SuperblockResult gptq_superblocks(const at::Tensor& weight, const at::Tensor& hessian, SuperblockType type,
                                  const GptqOptions& how) {
  const QuantizationGrid kind = grid_of(type);
  GptqOptions options = how;
  static_cast<QuantizationGrid&>(options) = kind;
  options.scale_dtype = at::kFloat;
  const ScaledWeight scaled = scaled_weight(weight, std::nullopt);
  const at::Tensor& values = scaled.values;
  const Damping damping = damping_of(hessian, options.ridge);
  const at::Tensor diagonal = damped_diagonal(hessian, damping).contiguous();

  SweepFactor factor = factor_for_sweep("gptq_superblocks", hessian, damping, options, values.scalar_type());
  Grid grid = make_grid(weight, options, scaled.units);
  const at::Tensor dead = dead_inputs(hessian);
  hold_dead_inputs(dead, values, grid);
  sweep_rows(values, factor, options, grid, diagonal, {});
  const Supers supers = round_to_superblocks(type, values, diagonal, grid);

  options.scales = grid.scales;
  options.group_scales = GroupScales::kStatic;
  options.scale_method = ScaleMethod::kAbsmax;
  options.beam_scales = 0;
  const at::Tensor row_loss = solve({scaled, hessian, damping, dead}, std::move(factor), options, {}, grid);
  return {finished(kind, grid, supers), row_loss};
}

}  // namespace miniquant::algorithms
