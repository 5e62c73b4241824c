#pragma once

#include <miniquant/export.h>
#include <miniquant/options.h>

#include <string_view>

namespace miniquant {

/// Options that belong together. docs/algorithm.md lists the gain and the cost of each preset.
enum class Preset {
  /// GPTQ as published: the smallest scales that hold each group's range, codes in [-7, 7] at 4 bits, columns from left
  /// to right. These are the defaults of GptqOptions.
  kPlain,
  /// A lower loss for little more time: columns in activation order, scales of least squared error, full range.
  kFast,
  /// The lowest loss: groups in order of activation, the scale of each group chosen by what it adds to the loss, full
  /// range, a beam search of the codes, two rounds of refinement.
  kBest,
};

/// The options of a preset. bits, group_size and ridge keep their defaults: set them as needed. For an asymmetric grid
/// (`symmetric` false) full_range stays false, because that grid has every code already.
MINIQUANT_API GptqOptions options_of(Preset preset, bool symmetric = true);

/// "plain", "fast" or "best".
MINIQUANT_API std::string_view name_of(Preset preset);

}  // namespace miniquant
