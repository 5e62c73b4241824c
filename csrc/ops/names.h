#pragma once

#include <c10/util/Exception.h>

#include <array>
#include <cstddef>
#include <string>
#include <string_view>

#include "miniquant/options.h"

// The names of choices: one table per enumeration, for both directions.

namespace miniquant::ops {

template <typename Choice>
struct Named {
  Choice choice;
  std::string_view name;
};

/// The table of an enumeration.
template <typename Choice>
extern const std::array<Named<Choice>, 0> kNames;

template <>
inline constexpr std::array<Named<ScaleMethod>, 4> kNames<ScaleMethod>{{{ScaleMethod::kAbsmax, "absmax"},
                                                                        {ScaleMethod::kMse, "mse"},
                                                                        {ScaleMethod::kHessian, "hessian"},
                                                                        {ScaleMethod::kLoss, "loss"}}};

template <>
inline constexpr std::array<Named<GroupScales>, 2> kNames<GroupScales>{
    {{GroupScales::kStatic, "static"}, {GroupScales::kDynamic, "dynamic"}}};

template <>
inline constexpr std::array<Named<ColumnOrder>, 3> kNames<ColumnOrder>{
    {{ColumnOrder::kNatural, "natural"}, {ColumnOrder::kActivation, "activation"}, {ColumnOrder::kGroup, "group"}}};

template <>
inline constexpr std::array<Named<SuperblockType>, 5> kNames<SuperblockType>{{{SuperblockType::kQ2K, "Q2_K"},
                                                                              {SuperblockType::kQ3K, "Q3_K"},
                                                                              {SuperblockType::kQ4K, "Q4_K"},
                                                                              {SuperblockType::kQ5K, "Q5_K"},
                                                                              {SuperblockType::kQ6K, "Q6_K"}}};

template <>
inline constexpr std::array<Named<HessianPrecision>, 2> kNames<HessianPrecision>{
    {{HessianPrecision::kFull, "full"}, {HessianPrecision::kBf16x3, "bf16x3"}}};

/// The name of a choice; for an invalid value "unknown", which no operator accepts.
template <typename Choice>
constexpr std::string_view name_of_choice(Choice choice) {
  for (const auto& [value, name] : kNames<Choice>) {
    if (value == choice) {
      return name;
    }
  }
  return "unknown";
}

/// "'static' or 'dynamic'".
template <typename Choice>
std::string quoted_names() {
  std::string text;
  const auto& table = kNames<Choice>;
  for (std::size_t i = 0; i < table.size(); ++i) {
    text.append(i == 0 ? "" : (i + 1 == table.size() ? " or " : ", ")).append("'").append(table[i].name).append("'");
  }
  return text;
}

/// The choice named by `argument` of `op`. Throws c10::ValueError for an unknown name.
template <typename Choice>
Choice choice_named(const char* op, const char* argument, std::string_view text) {
  for (const auto& [value, name] : kNames<Choice>) {
    if (name == text) {
      return value;
    }
  }
  TORCH_CHECK_VALUE(false, op, ": expected ", argument, " to be ", quoted_names<Choice>(), ", but got '", text, "'");
}

}  // namespace miniquant::ops
