#include <string_view>

#include "miniquant/miniquant.h"

// Choices as the operators' strings. The switches have no default, so that the compiler asks for a new choice's name.

namespace miniquant {

std::string_view name_of(ScaleMethod method) {
  switch (method) {
    case ScaleMethod::kAbsmax:
      return "absmax";
    case ScaleMethod::kMse:
      return "mse";
    case ScaleMethod::kHessian:
      return "hessian";
    case ScaleMethod::kLoss:
      return "loss";
  }
  return "unknown";
}

std::string_view name_of(GroupScales group_scales) {
  switch (group_scales) {
    case GroupScales::kStatic:
      return "static";
    case GroupScales::kDynamic:
      return "dynamic";
  }
  return "unknown";
}

std::string_view name_of(ColumnOrder column_order) {
  switch (column_order) {
    case ColumnOrder::kNatural:
      return "natural";
    case ColumnOrder::kActivation:
      return "activation";
    case ColumnOrder::kGroup:
      return "group";
  }
  return "unknown";
}

std::string_view name_of(Preset preset) {
  switch (preset) {
    case Preset::kPlain:
      return "plain";
    case Preset::kFast:
      return "fast";
    case Preset::kBest:
      return "best";
  }
  return "unknown";
}

}  // namespace miniquant
