#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace miniquant::driver {

struct OutputFile {
  std::filesystem::path path;
  std::string text;
};

/// Writes all files, or none of them. Folders that are missing are made.
///
/// Each text goes to a temporary file in the folder of its file, is flushed to disk, and only when all are there are
/// they renamed to their names in the order given, replacing what was there. If a step fails, what was there before is
/// put back, and std::system_error says which file and why. A machine that stops between two renames can leave an
/// earlier file new and a later one old, so the file that vouches for the others belongs last.
void write_files(const std::vector<OutputFile>& files);

}  // namespace miniquant::driver
