#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace miniquant::driver {

struct OutputFile {
  std::string name;  ///< inside the output folder
  std::string text;
};

/// Writes all files into `folder` (made if missing), or none of them.
///
/// Each text goes to a temporary file in the same folder, is flushed to disk, and only when all are there are they
/// renamed to their names in the order given, replacing what was there. If a step fails, what was there before is put
/// back, and std::system_error says which file and why. A machine that stops between two renames can leave an earlier
/// file new and a later one old, so the file that vouches for the others belongs last.
void write_files(const std::filesystem::path& folder, const std::vector<OutputFile>& files);

}  // namespace miniquant::driver
