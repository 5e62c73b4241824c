#pragma once

#include <string>
#include <utility>
#include <vector>

#include "driver/atomic_file.h"
#include "driver/comparison.h"
#include "driver/options.h"
#include "driver/problem.h"

namespace miniquant::driver {

/// One run: its problem, its figures, and the time of each stage. The tensors of `problem` may have been released.
struct Run {
  Problem problem;
  Comparison comparison;
  std::vector<std::pair<std::string, double>> seconds;
};

inline constexpr const char* kResultsName = "results.json";
inline constexpr const char* kManifestName = "manifest.json";

/// results.json: the figures and everything they depend on. No times, dates or threads: the same command gives the same
/// bytes. Its JSON Schema is docs/results.schema.json.
[[nodiscard]] std::string results_json(const Options& options, const std::vector<Run>& runs);

/// manifest.json: how the other files of a run, `outputs`, were made. `command` is the program's name and its
/// arguments. Its JSON Schema is docs/manifest.schema.json.
[[nodiscard]] std::string manifest_json(const Options& options, const std::vector<Run>& runs,
                                        const std::vector<std::string>& command,
                                        const std::vector<OutputFile>& outputs);

}  // namespace miniquant::driver
