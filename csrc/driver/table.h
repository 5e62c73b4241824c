#pragma once

#include <string>
#include <vector>

#include "driver/options.h"
#include "driver/report.h"

namespace miniquant::driver {

/// The figures as a person reads them: all runs side by side, in plain ASCII, ends with a newline.
[[nodiscard]] std::string table(const Options& options, const std::vector<Run>& runs);

}  // namespace miniquant::driver
