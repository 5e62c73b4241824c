#include "driver/build_info.h"

#include <miniquant_git_revision.h>
#include <torch/version.h>

namespace miniquant::driver {

const BuildInfo& build_info() {
  static const BuildInfo kInfo = {
      .miniquant = MINIQUANT_VERSION,
      .torch = TORCH_VERSION,
      .compiler = MINIQUANT_COMPILER,
      .cxx_standard = "C++" + std::to_string(__cplusplus / 100 % 100),
      .git_revision = MINIQUANT_GIT_REVISION,
  };
  return kInfo;
}

}  // namespace miniquant::driver
