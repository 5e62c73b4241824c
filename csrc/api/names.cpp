#include "miniquant/names.h"

#include "ops/names.h"

namespace miniquant {

std::string_view name_of(ScaleMethod method) { return ops::name_of_choice(method); }

std::string_view name_of(GroupScales group_scales) { return ops::name_of_choice(group_scales); }

std::string_view name_of(ColumnOrder column_order) { return ops::name_of_choice(column_order); }

std::string_view name_of(SuperblockType type) { return ops::name_of_choice(type); }

std::string_view name_of(HessianPrecision precision) { return ops::name_of_choice(precision); }

}  // namespace miniquant
