#pragma once

#include <miniquant/export.h>
#include <miniquant/options.h>

#include <string_view>

namespace miniquant {

/// Options that belong together. docs/algorithm.md says what each gains and costs.
enum class Preset {
  /// The lab's: scales that just hold each group's range, codes in [-7, 7] at 4 bits, columns from left to right.
  kLab,
  /// A lower loss for little more time: columns in activation order, scales of least squared error, every code used.
  kFast,
  /// The lowest loss: groups in order of activation, each group's scale chosen by what it adds to the loss, every code
  /// used, a beam search of the codes, two rounds of refinement.
  kBest,
};

/// GptqOptions of the preset; bits, group_size and ridge are the defaults, and yours to change.
MINIQUANT_API GptqOptions options_of(Preset preset);

/// "lab", "fast" or "best".
MINIQUANT_API std::string_view name_of(Preset preset);

}  // namespace miniquant
