#pragma once

#include <iosfwd>
#include <string>
#include <vector>

namespace miniquant::driver {

/// The whole program: reads the command line, runs the comparisons, prints the table to `out` and errors to `error`,
/// and writes the files. `progress`: whether `error` is a terminal, which then shows the progress.
/// Returns the exit code: 0 done; 1 could not be computed or written, or --check failed; 2 bad option or input.
[[nodiscard]] int run_session(const std::string& program, const std::vector<std::string>& arguments, std::ostream& out,
                              std::ostream& error, bool progress);

}  // namespace miniquant::driver
