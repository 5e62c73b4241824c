#include "miniquant/presets.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <tuple>

#include "ops/names.h"

namespace miniquant {

template <>
inline constexpr std::array<ops::Named<Preset>, 3> ops::kNames<Preset>{
    {{Preset::kPlain, "plain"}, {Preset::kFast, "fast"}, {Preset::kBest, "best"}}};

std::string_view name_of(Preset preset) { return ops::name_of_choice(preset); }

GptqOptions options_of(Preset preset, bool symmetric) {
  GptqOptions options;
  options.symmetric = symmetric;
  switch (preset) {
    case Preset::kPlain:
      break;
    case Preset::kFast:
      options.full_range = symmetric;
      options.scale_method = ScaleMethod::kMse;
      options.column_order = ColumnOrder::kActivation;
      break;
    case Preset::kBest:
      options.full_range = symmetric;
      options.scale_method = ScaleMethod::kLoss;
      options.group_scales = GroupScales::kDynamic;
      options.column_order = ColumnOrder::kGroup;
      options.beam_scales = 2;
      options.refine = 2;
      break;
  }
  return options;
}

namespace {

/// The options that presets set, by the operators' names.
using PresetTuple = std::tuple<bool, bool, std::string, std::string, std::string, int64_t, int64_t>;

PresetTuple preset(std::string_view name, bool symmetric) {
  constexpr std::array kPresets = {Preset::kPlain, Preset::kFast, Preset::kBest};
  const auto* const found = std::ranges::find(kPresets, name, [](Preset preset) { return name_of(preset); });
  TORCH_CHECK_VALUE(found != kPresets.end(), "preset: expected name to be 'plain', 'fast' or 'best', but got '", name,
                    "'");
  const GptqOptions options = options_of(*found, symmetric);
  return {options.symmetric,
          options.full_range,
          std::string(ops::name_of_choice(options.scale_method)),
          std::string(ops::name_of_choice(options.group_scales)),
          std::string(ops::name_of_choice(options.column_order)),
          options.beam_scales,
          options.refine};
}

}  // namespace
}  // namespace miniquant

// Python's miniquant.preset() reads its options here.
TORCH_LIBRARY_FRAGMENT(miniquant, m) {
  m.def(
      "preset(str name, *, bool symmetric=True) -> (bool symmetric, bool full_range, str scale_method, "
      "str group_scales, str column_order, int beam_scales, int refine)",
      miniquant::preset);
}
