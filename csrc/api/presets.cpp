#include "miniquant/presets.h"

#include <array>

#include "ops/names.h"

namespace miniquant {

template <>
inline constexpr std::array<ops::Named<Preset>, 3> ops::kNames<Preset>{
    {{Preset::kPlain, "plain"}, {Preset::kFast, "fast"}, {Preset::kBest, "best"}}};

std::string_view name_of(Preset preset) { return ops::name_of_choice(preset); }

GptqOptions options_of(Preset preset) {
  GptqOptions options;
  switch (preset) {
    case Preset::kPlain:
      break;
    case Preset::kFast:
      options.full_range = true;
      options.scale_method = ScaleMethod::kMse;
      options.column_order = ColumnOrder::kActivation;
      break;
    case Preset::kBest:
      options.full_range = true;
      options.scale_method = ScaleMethod::kLoss;
      options.group_scales = GroupScales::kDynamic;
      options.column_order = ColumnOrder::kGroup;
      options.beam_scales = 2;
      options.refine = 2;
      break;
  }
  return options;
}

}  // namespace miniquant
