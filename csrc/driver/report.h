#pragma once

#include <string>
#include <utility>
#include <vector>

#include "driver/atomic_file.h"
#include "driver/comparison.h"
#include "driver/options.h"
#include "driver/problem.h"

namespace miniquant::driver {

/// One run: what was compared, what came out, how long each stage took. The tensors of `problem` may have been
/// released.
struct Run {
  Problem problem;
  Comparison comparison;
  std::vector<std::pair<std::string, double>> seconds;
};

inline constexpr const char* kResultsName = "results.json";
inline constexpr const char* kManifestName = "manifest.json";

/// results.json: the figures and all they depend on. No times, dates or threads, so that the same command gives the
/// same bytes. Its JSON Schema is docs/results.schema.json.
[[nodiscard]] std::string results_json(const Options& options, const std::vector<Run>& runs);

/// manifest.json: how the other files of a run, `outputs`, came about. `command` is the program's name and its
/// arguments. Its JSON Schema is docs/manifest.schema.json.
[[nodiscard]] std::string manifest_json(const Options& options, const std::vector<Run>& runs,
                                        const std::vector<std::string>& command,
                                        const std::vector<OutputFile>& outputs);

}  // namespace miniquant::driver
