#include "algorithms/grid.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/TypeCast.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

#include "algorithms/dispatch.h"
#include "algorithms/power_of_two.h"

namespace miniquant::algorithms {
namespace {

/// The type in which dequantize() multiplies scales of dtype Stored, and through which ATen converts them.
template <typename Stored>
using Arithmetic = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

/// The largest value of Arithmetic<Stored> that stays finite when it is rounded to Stored.
template <typename Stored>
constexpr Arithmetic<Stored> kLargestFinite = std::numeric_limits<Stored>::max();
template <>
constexpr float kLargestFinite<c10::Half> = 0x1.ffdffep15F;  // below 65520
template <>
constexpr float kLargestFinite<c10::BFloat16> = 0x1.fefffep127F;  // below 2^128 - 2^119

template <typename Stored>
constexpr double kSmallestScale = std::numeric_limits<Stored>::min();
template <>
constexpr double kSmallestScale<c10::Half> =
    0x1p-24;  // subnormal: normal float16 ends above the scales of small weights
template <>
constexpr double kSmallestScale<c10::BFloat16> = kSmallestScale<float>;

template <typename Stored>
Stored next_below(Stored positive) {
  if constexpr (std::is_floating_point_v<Stored>) {
    return std::nextafter(positive, Stored(0));
  } else {
    return Stored(static_cast<uint16_t>(positive.x - 1), Stored::from_bits());
  }
}

/// Whether `levels` multiples of a scale are finite as Stored.
template <typename Stored>
bool is_finite(Arithmetic<Stored> scale, int32_t levels) {
  return scale * static_cast<Arithmetic<Stored>>(levels) <= kLargestFinite<Stored>;
}

// c10::convert: on ARM a float becomes a Half by way of __fp16, of which g++ warns outside torch's headers.
template <typename Stored>
Stored largest_scale_of(int32_t levels) {
  auto scale = c10::convert<Stored>(kLargestFinite<Stored> / static_cast<Arithmetic<Stored>>(levels));
  while (!is_finite<Stored>(static_cast<Arithmetic<Stored>>(scale), levels)) {
    scale = next_below(scale);
  }
  return scale;
}

template <typename T, typename Stored>
T round_scale(T scale, int32_t levels) {
  constexpr T smallest = static_cast<T>(kSmallestScale<Stored>);
  const auto stored = c10::convert<Stored>(static_cast<Arithmetic<Stored>>(scale));
  return is_finite<Stored>(static_cast<Arithmetic<Stored>>(stored), levels)
             ? std::max(static_cast<T>(stored), smallest)
             : static_cast<T>(largest_scale_of<Stored>(levels));
}

/// kernels::RoundScale for a dtype at most as wide as T.
template <typename T>
kernels::RoundScale<T> round_scale_to(at::ScalarType stored) {
  switch (stored) {
    case at::kBFloat16:
      return round_scale<T, c10::BFloat16>;
    case at::kHalf:
      return round_scale<T, c10::Half>;
    case at::kFloat:
      return round_scale<T, float>;
    default:
      return round_scale<T, T>;
  }
}

/// Max |exponent| of rows that need no unit: squares of the row and of its rounding errors are in range.
constexpr int kOrdinaryExponent = 30;

/// A unit and its reciprocal are normal numbers.
template <typename T>
constexpr int kLargestUnitExponent = std::numeric_limits<T>::max_exponent - 3;

/// The smallest magnitude other than 0, and the largest; both 0 if there is none.
template <typename T>
struct Magnitudes {
  T smallest = T(0);
  T largest = T(0);
};

template <typename T>
Magnitudes<T> magnitudes(const T* values, int64_t count) {
  Magnitudes<T> found;
  for (int64_t i = 0; i < count; ++i) {
    const T magnitude = std::abs(values[i]);
    if (magnitude > 0) {
      found.smallest = found.largest == 0 ? magnitude : std::min(found.smallest, magnitude);
      found.largest = std::max(found.largest, magnitude);
    }
  }
  return found;
}

/// The exponent of the unit of a row with this largest weight and these given scales, if any; 0 if no unit keeps all of
/// them in range.
template <typename T>
int64_t exponent_of_unit(T weight, Magnitudes<T> scales) {
  constexpr int kScaleAboveWeight = 60;  // a larger scale rounds the whole row to 0
  constexpr int kScaleBelowWeight = std::numeric_limits<T>::max_exponent - 28;
  if (weight == 0) {
    return 0;
  }
  int exponent = std::ilogb(weight);
  if (scales.largest > 0) {
    const int least = std::ilogb(scales.largest) - kScaleAboveWeight;
    const int most = std::ilogb(scales.smallest) + kScaleBelowWeight;
    exponent = least > most ? 0 : std::clamp(exponent, least, most);
  }
  return std::abs(exponent) <= kOrdinaryExponent
             ? 0
             : std::clamp(exponent, -kLargestUnitExponent<T>, kLargestUnitExponent<T>);
}

template <typename T>
at::Tensor exponents_of_units(const at::Tensor& values, const at::Tensor& scales) {
  const int64_t rows = values.size(0);
  const int64_t columns = values.size(1);
  const int64_t groups = scales.defined() ? scales.size(1) : 0;
  at::Tensor exponents = at::empty({rows}, values.options().dtype(at::kLong));
  const T* const value = values.const_data_ptr<T>();
  const T* const scale = scales.defined() ? scales.const_data_ptr<T>() : nullptr;
  int64_t* const to = exponents.mutable_data_ptr<int64_t>();
  const at::Tensor largest = at::empty({rows}, values.options());
  T* const weight = largest.mutable_data_ptr<T>();
  for_row_tiles(rows, 1, kOperationsPerEntryRead * columns, [&](int64_t row_begin, int64_t row_end) {
    typed_kernels<T>().largest_magnitudes(value, columns, row_begin, row_end, weight);
    for (int64_t row = row_begin; row < row_end; ++row) {
      to[row] = exponent_of_unit(weight[row], groups == 0 ? Magnitudes<T>{} : magnitudes(scale + row * groups, groups));
    }
  });
  return exponents;
}

}  // namespace

at::ScalarType compute_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

kernels::CodeRange code_range(int64_t bits, bool symmetric, bool full_range) {
  const auto half = static_cast<int32_t>(1U << static_cast<unsigned>(bits - 1));
  return {symmetric && !full_range ? 1 - half : -half, half - 1, symmetric};
}

double smallest_scale(at::ScalarType stored) {
  switch (stored) {
    case at::kHalf:
      return kSmallestScale<c10::Half>;
    case at::kDouble:
      return kSmallestScale<double>;
    default:
      return kSmallestScale<float>;  // of bfloat16, too
  }
}

double largest_scale(at::ScalarType stored, int32_t levels) {
  switch (stored) {
    case at::kHalf:
      return largest_scale_of<c10::Half>(levels);
    case at::kBFloat16:
      return largest_scale_of<c10::BFloat16>(levels);
    case at::kDouble:
      return largest_scale_of<double>(levels);
    default:
      return largest_scale_of<float>(levels);
  }
}

int64_t columns_per_group(int64_t group_size, int64_t columns) {
  const int64_t row = std::max<int64_t>(columns, 1);
  return group_size == -1 ? row : std::min(group_size, row);
}

int64_t groups_per_row(int64_t group_size, int64_t columns) {
  const int64_t group_columns = columns_per_group(group_size, columns);
  return columns / group_columns + (columns % group_columns != 0 ? 1 : 0);
}

ScaledWeight scaled_weight(const at::Tensor& weight, const std::optional<at::Tensor>& scales) {
  const at::ScalarType dtype = compute_dtype(weight.scalar_type());
  ScaledWeight result{.values = weight.to(dtype).contiguous(), .units = {}, .exponents = {}};
  const at::Tensor given = scales.has_value() ? scales->to(at::kCPU, dtype).contiguous() : at::Tensor();
  const at::Tensor values = result.values.cpu();
  at::Tensor exponents;
  dispatch_compute(dtype, [&]<typename T> { exponents = exponents_of_units<T>(values, given); });
  if (exponents.any().item<bool>()) {
    result.exponents = exponents;
    result.units = times_power_of_two(at::ones({weight.size(0)}, values.options()), exponents).to(weight.device());
    result.values = result.values / result.units.unsqueeze(1);
  }
  return result;
}

at::Tensor Grid::stored_scales() const { return (units.defined() ? scales * units.unsqueeze(1) : scales).to(stored); }

Grid make_grid(const at::Tensor& weight, const GridOptions& options, const at::Tensor& units) {
  const std::optional<at::Tensor>& scales = options.scales;
  const std::optional<at::Tensor>& zero_points = options.zero_points;
  const int64_t rows = weight.size(0);
  const int64_t columns = weight.size(1);
  const int64_t groups = groups_per_row(options.group_size, columns);
  const at::ScalarType dtype = compute_dtype(weight.scalar_type());
  const auto bytes = weight.options().dtype(at::kChar).memory_format(at::MemoryFormat::Contiguous);
  Grid grid{.range = code_range(options.bits, options.symmetric, options.full_range),
            .group_size = columns_per_group(options.group_size, columns),
            .stored = options.scale_dtype.value_or(weight.scalar_type()),
            .codes = at::empty({rows, columns}, bytes),
            .scales = scales.has_value() ? scales->to(dtype).clone(at::MemoryFormat::Contiguous)
                                         : at::empty({rows, groups}, bytes.dtype(dtype)),
            .zero_points = zero_points.has_value() ? zero_points->clone(at::MemoryFormat::Contiguous)
                                                   : at::zeros({rows, groups}, bytes),
            .units = units,
            .held = {},
            .steps = {}};
  if (scales.has_value() && units.defined()) {
    grid.scales.div_(units.unsqueeze(1));
  }
  return grid;
}

void hold_dead_inputs(const at::Tensor& dead, const at::Tensor& weight, Grid& grid) {
  if (dead.numel() == 0) {
    return;
  }
  const at::Tensor group = dead.div(grid.group_size, "floor").expand({weight.size(0), -1});
  const at::Tensor values = weight.index_select(1, dead);
  // The zeros that the extremes start from count as weights.
  const auto extreme = [&](std::string_view reduce) {
    return at::zeros({weight.size(0), grid.scales.size(1)}, weight.options()).scatter_reduce_(1, group, values, reduce);
  };
  grid.held = at::stack({extreme("amin"), extreme("amax")}, /*dim=*/2);
}

at::Tensor with_minima(const at::Tensor& weight, const Grid& grid) {
  return grid.steps.minima.defined() ? weight + grid.steps.minima.repeat_interleave(grid.group_size, 1) : weight;
}

namespace {

template <typename T>
kernels::StepsView<T> view(const GridSteps& steps) {
  if (!steps.scales.defined()) {
    return {};
  }
  const bool has_minima = steps.minima.defined();
  return {.scale_steps = steps.scales.const_data_ptr<T>(),
          .minimum_steps = has_minima ? steps.minimums.const_data_ptr<T>() : nullptr,
          .minima = has_minima ? steps.minima.mutable_data_ptr<T>() : nullptr,
          .lowest = steps.lowest,
          .highest = steps.highest};
}

}  // namespace

template <typename T>
kernels::GridView<T> view(const Grid& grid) {
  return {.range = grid.range,
          .group_size = grid.group_size,
          .groups = grid.scales.size(1),
          .scales = grid.scales.mutable_data_ptr<T>(),
          .zero_points = grid.zero_points.mutable_data_ptr<int8_t>(),
          .codes = grid.codes.mutable_data_ptr<int8_t>(),
          .round_scale = round_scale_to<T>(grid.stored),
          .units = grid.units.defined() ? grid.units.const_data_ptr<T>() : nullptr,
          .held = grid.held.defined() ? grid.held.const_data_ptr<T>() : nullptr,
          .steps = view<T>(grid.steps)};
}
template kernels::GridView<float> view(const Grid& grid);
template kernels::GridView<double> view(const Grid& grid);

template <typename T>
std::vector<T> scale_factors(const kernels::CodeRange& range, ScaleMethod method) {
  std::vector<T> factors = {T(1)};
  if (method != ScaleMethod::kAbsmax) {
    // From half the range to 1.1 times the range, in steps of 1/40; the likelier half first.
    for (int step = -1; step >= -20; --step) {
      factors.push_back(T(1) + static_cast<T>(step) / 40);
    }
    for (int step = 1; step <= 4; ++step) {
      factors.push_back(T(1) + static_cast<T>(step) / 40);
    }
    // In a sweep the other sign pays only where the extra level is one of few.
    const bool few_levels = range.code_max < 7;
    if (range.symmetric && -range.code_min > range.code_max && (method != ScaleMethod::kLoss || few_levels)) {
      const size_t count = factors.size();
      for (size_t i = 0; i < count; ++i) {
        factors.push_back(-factors[i]);
      }
    }
  }
  return factors;
}
template std::vector<float> scale_factors(const kernels::CodeRange& range, ScaleMethod method);
template std::vector<double> scale_factors(const kernels::CodeRange& range, ScaleMethod method);

template <typename T>
ScalesOfRows<T>::ScalesOfRows(const Grid& grid, const at::Tensor& weight, ScaleMethod method,
                              const at::Tensor& importance)
    : grid_(view<T>(grid)),
      weight_(weight.const_data_ptr<T>()),
      columns_(weight.size(1)),
      method_(method),
      factors_(scale_factors<T>(grid.range, method)) {
  TORCH_INTERNAL_ASSERT(method != ScaleMethod::kLoss);
  if (method == ScaleMethod::kHessian) {
    importance_ = importance.to(weight.scalar_type()).contiguous();
  } else if (method == ScaleMethod::kMse) {
    importance_ = at::ones({columns_}, weight.options());
  }
}

template <typename T>
void ScalesOfRows<T>::set(int64_t row_begin, int64_t row_end) const {
  const auto& kernel = typed_kernels<T>();
  if (method_ == ScaleMethod::kAbsmax) {
    kernel.compute_grid(grid_, weight_, columns_, row_begin, row_end);
    return;
  }
  const kernels::ScaleSearch<T> search{factors_.data(), static_cast<int64_t>(factors_.size()),
                                       importance_.template const_data_ptr<T>()};
  kernel.search_grid(grid_, search, weight_, columns_, row_begin, row_end);
}

template class ScalesOfRows<float>;
template class ScalesOfRows<double>;

void compute_scales(Grid& grid, const at::Tensor& weight, ScaleMethod method, const at::Tensor& importance) {
  dispatch_compute(weight.scalar_type(), [&]<typename T> {
    const ScalesOfRows<T> scales(grid, weight, method, importance);
    for_row_tiles(weight.size(0), typed_kernels<T>().tile_rows, scales.operations(),
                  [&](int64_t row_begin, int64_t row_end) { scales.set(row_begin, row_end); });
  });
}

}  // namespace miniquant::algorithms
