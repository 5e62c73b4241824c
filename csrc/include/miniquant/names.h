#pragma once

#include <miniquant/export.h>
#include <miniquant/options.h>

#include <string_view>

namespace miniquant {

/// The name of a choice in the arguments of the operators: "absmax", "static", "natural", "Q4_K", ...
MINIQUANT_API std::string_view name_of(ScaleMethod method);
MINIQUANT_API std::string_view name_of(GroupScales group_scales);
MINIQUANT_API std::string_view name_of(ColumnOrder column_order);
MINIQUANT_API std::string_view name_of(SuperblockType type);
MINIQUANT_API std::string_view name_of(HessianPrecision precision);

}  // namespace miniquant
