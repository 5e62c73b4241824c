#pragma once

#include <miniquant/export.h>
#include <miniquant/options.h>

#include <string_view>

namespace miniquant {

/// Options that belong together. docs/algorithm.md says what each gains and costs.
enum class Preset {
  /// GPTQ as published: scales that just hold each group's range, codes in [-7, 7] at 4 bits, columns from left to
  /// right. These are the defaults of GptqOptions.
  kPlain,
  /// A lower loss for little more time: columns in activation order, scales of least squared error, every code used.
  kFast,
  /// The lowest loss: groups in order of activation, each group's scale chosen by what it adds to the loss, every code
  /// used, a beam search of the codes, two rounds of refinement.
  kBest,
};

/// The options of a preset. It leaves bits, group_size and ridge at their defaults: set them as needed. An asymmetric
/// grid (`symmetric` false) has every code already, so full_range stays false.
MINIQUANT_API GptqOptions options_of(Preset preset, bool symmetric = true);

/// "plain", "fast" or "best".
MINIQUANT_API std::string_view name_of(Preset preset);

}  // namespace miniquant
