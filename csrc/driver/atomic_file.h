#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace miniquant::driver {

struct OutputFile {
  std::filesystem::path path;
  std::string text;
};

/// Writes all files, or none of them. Creates missing folders.
///
/// Each text is written to a temporary file in the folder of its target and flushed to disk. When all are written, they
/// are renamed to their targets in the order given, replacing existing files. If a step fails, the earlier files are
/// restored, and std::system_error names the file and the reason. If the machine stops between two renames, an earlier
/// file can be new and a later one old: put the file that lists the others last.
void write_files(const std::vector<OutputFile>& files);

}  // namespace miniquant::driver
