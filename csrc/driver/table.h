#pragma once

#include <string>
#include <vector>

#include "driver/options.h"
#include "driver/report.h"

namespace miniquant::driver {

/// The figures for a person to read: all runs side by side, in plain ASCII, with a newline at the end.
[[nodiscard]] std::string table(const Options& options, const std::vector<Run>& runs);

}  // namespace miniquant::driver
