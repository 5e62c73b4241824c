#include "driver/session.h"

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <miniquant/build.h>

#include <exception>
#include <filesystem>
#include <functional>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <utility>
#include <variant>

#include "driver/atomic_file.h"
#include "driver/comparison.h"
#include "driver/error.h"
#include "driver/layer_file.h"
#include "driver/options.h"
#include "driver/problem.h"
#include "driver/progress.h"
#include "driver/report.h"
#include "driver/table.h"

namespace miniquant::driver {
namespace {

constexpr int kDone = 0;
constexpr int kFailed = 1;
constexpr int kBadInput = 2;

using Source = std::pair<std::string, std::function<Problem()>>;

std::vector<Source> sources(const Options& options) {
  std::vector<Source> list;
  if (const auto* file = std::get_if<FileSource>(&options.source)) {
    list.emplace_back("file", [file] { return load_problem(*file); });
    return list;
  }
  const auto& synthetic = std::get<SyntheticSource>(options.source);
  for (const Distribution distribution : synthetic.distributions) {
    list.emplace_back(name_of(distribution),
                      [&synthetic, distribution] { return draw_problem(synthetic, distribution); });
  }
  return list;
}

// The report needs shapes and origins only, so the data are released before the next run draws its own.
void release_data(Problem& problem) {
  const auto shape_only = [](const at::Tensor& tensor) { return tensor.to(at::kMeta); };
  problem.weight = shape_only(problem.weight);
  problem.inputs = shape_only(problem.inputs);
  if (problem.fresh_inputs) problem.fresh_inputs = shape_only(*problem.fresh_inputs);
}

std::vector<Run> run_all(const Options& options, std::ostream& error, bool progress) {
  const std::vector<Source> all = sources(options);
  std::optional<Progress> line;
  std::vector<Run> runs;
  for (const auto& [name, make] : all) {
    // The number of stages is known once the first problem is: it depends on whether there are fresh inputs.
    Stages stages([&, run = name](std::string_view stage) {
      if (line) line->step(run + ": " + std::string(stage));
    });
    Run run;
    stages.run("inputs", [&problem = run.problem, &make_problem = make] { problem = make_problem(); });
    if (!line) {
      line.emplace(error, progress, all.size() * (stage_count(run.problem, options) + 1U));
      line->step(name + ": inputs");
    }
    run.comparison = compare(run.problem, options, stages);
    run.seconds = stages.seconds();
    release_data(run.problem);
    runs.push_back(std::move(run));
  }
  return runs;
}

// Rejects, before any work, a path that cannot be written at the end.
void check_folder(std::string_view option, const std::filesystem::path& folder) {
  std::error_code ignored;
  if (std::filesystem::exists(folder, ignored) && !std::filesystem::is_directory(folder, ignored)) {
    throw InputError(std::string(option) + ": expected a folder, but " + folder.string() + " is a file");
  }
}

void check_outputs(const Options& options) {
  check_folder("--output", options.output);
  if (options.save.empty()) return;
  check_folder("--save", options.save.parent_path());
  std::error_code ignored;
  if (std::filesystem::is_directory(options.save, ignored)) {
    throw InputError("--save: expected a file, but " + options.save.string() + " is a folder");
  }
  // The manifest lists files by name.
  if (options.save.filename() == kResultsName || options.save.filename() == kManifestName) {
    throw InputError("--save: expected another name than " + std::string(kResultsName) + " and " + kManifestName +
                     ", but got " + options.save.string());
  }
}

// The manifest comes last, because it lists the others.
std::vector<OutputFile> output_files(const Options& options, const std::vector<Run>& runs,
                                     const std::vector<std::string>& command) {
  std::vector<OutputFile> files;
  if (!options.save.empty()) {
    const Run& run = runs.front();
    GptqOptions gptq = options.gptq;
    gptq.ridge = run.comparison.ridge;
    files.push_back({options.save, layer_file(run.comparison.quantized, gptq, run.problem.weight_origin.tensor)});
  }
  files.push_back({options.output / kResultsName, results_json(options, runs)});
  files.push_back({options.output / kManifestName, manifest_json(options, runs, command, files)});
  return files;
}

// "a, b and c"
std::string listed(const std::vector<OutputFile>& files) {
  std::string text;
  for (std::size_t i = 0; i < files.size(); ++i) {
    if (i > 0) text += i + 1 == files.size() ? " and " : ", ";
    text += files[i].path.string();
  }
  return text;
}

bool all_checks_passed(const std::vector<Run>& runs) {
  for (const Run& run : runs) {
    if (run.comparison.check && !run.comparison.check->passed) return false;
  }
  return true;
}

// The library chooses its kernels at their first use; this reports a wrong MINIQUANT_ISA before that.
void check_environment() {
  try {
    static_cast<void>(instruction_set());
  } catch (const std::invalid_argument& error) {
    throw InputError(error.what());
  }
}

int run_options(const Options& options, const std::vector<std::string>& command, std::ostream& out, std::ostream& error,
                bool progress) {
  check_environment();
  check_outputs(options);
  if (options.threads > 0) at::set_num_threads(options.threads);
  const c10::InferenceMode inference;
  const std::vector<Run> runs = run_all(options, error, progress && !options.quiet);

  // Files are written first: a reader of the table that exits early (`| head`) ends the program.
  std::exception_ptr write_error;
  const std::vector<OutputFile> files = output_files(options, runs, command);
  try {
    write_files(files);
  } catch (const std::exception&) {
    write_error = std::current_exception();
  }
  if (!options.quiet) out << table(options, runs);
  if (write_error) {
    out.flush();
    std::rethrow_exception(write_error);
  }
  if (!options.quiet) out << "\nwrote " << listed(files) << '\n';
  out.flush();
  if (all_checks_passed(runs)) return kDone;
  error << "gptq_toy: --check: gptq and gptq_reference differ in float64 by more than " << kMaxLossDifference
        << " of the loss\n";
  return kFailed;
}

}  // namespace

int run_session(const std::string& program, const std::vector<std::string>& arguments, std::ostream& out,
                std::ostream& error, bool progress) {
  const auto report = [&](std::string_view message, int code) {
    out.flush();
    error << "gptq_toy: " << message << '\n';
    return code;
  };
  try {
    const auto parsed = parse_options(arguments);
    if (const auto* information = std::get_if<Information>(&parsed)) {
      out << information->text << std::flush;
      return kDone;
    }
    std::vector<std::string> command = {std::filesystem::path(program).filename().string()};
    command.insert(command.end(), arguments.begin(), arguments.end());
    return run_options(std::get<Options>(parsed), command, out, error, progress);
  } catch (const InputError& problem) {
    return report(problem.what(), kBadInput);
  } catch (const c10::ValueError& problem) {
    return report(problem.what_without_backtrace(), kBadInput);
  } catch (const c10::TypeError& problem) {
    return report(problem.what_without_backtrace(), kBadInput);
  } catch (const c10::Error& problem) {
    return report(problem.what_without_backtrace(), kFailed);
  } catch (const std::bad_alloc&) {
    return report("not enough memory", kFailed);
  } catch (const std::exception& problem) {
    return report(problem.what(), kFailed);
  }
}

}  // namespace miniquant::driver
