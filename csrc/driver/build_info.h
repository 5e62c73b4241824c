#pragma once

#include <string>

namespace miniquant::driver {

/// The versions that this program was built from.
struct BuildInfo {
  std::string miniquant;     ///< version
  std::string torch;         ///< version
  std::string compiler;      ///< name and version
  std::string cxx_standard;  ///< C++20
  std::string git_revision;  ///< the commit checked out at the build; empty outside a checkout
};

[[nodiscard]] const BuildInfo& build_info();

}  // namespace miniquant::driver
