#include "driver/session.h"

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <exception>
#include <filesystem>
#include <functional>
#include <optional>
#include <ostream>
#include <string_view>
#include <system_error>
#include <utility>
#include <variant>

#include "driver/atomic_file.h"
#include "driver/comparison.h"
#include "driver/error.h"
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

// The report needs shapes and origins only: the data go before the next run's are drawn.
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
    // How many stages there are is known once the first problem is: whether it has fresh inputs.
    Stages stages([&, run = name](std::string_view stage) {
      if (line) line->step(run + ": " + std::string(stage));
    });
    Run run;
    run.problem = stages.run("inputs", make);
    if (!line) {
      line.emplace(error, progress, all.size() * (stage_count(run.problem, options.check) + 1U));
      line->step(name + ": inputs");
    }
    run.comparison = compare(run.problem, options, stages);
    run.seconds = stages.seconds();
    release_data(run.problem);
    runs.push_back(std::move(run));
  }
  return runs;
}

// Before any work: what is sure to fail at its end.
void check_output_folder(const std::filesystem::path& folder) {
  std::error_code ignored;
  if (std::filesystem::exists(folder, ignored) && !std::filesystem::is_directory(folder, ignored)) {
    throw InputError("--output: expected a folder, but " + folder.string() + " is a file");
  }
}

bool all_checks_passed(const std::vector<Run>& runs) {
  for (const Run& run : runs) {
    if (run.comparison.check && !run.comparison.check->passed) return false;
  }
  return true;
}

int run_options(const Options& options, const std::vector<std::string>& command, std::ostream& out, std::ostream& error,
                bool progress) {
  check_output_folder(options.output);
  if (options.threads > 0) at::set_num_threads(options.threads);
  const c10::InferenceMode inference;
  const std::vector<Run> runs = run_all(options, error, progress && !options.quiet);

  // The files come first: a reader of the table that goes away early (`| head`) ends the program.
  std::exception_ptr write_error;
  try {
    const std::string results = results_json(options, runs);
    const std::string manifest = manifest_json(options, runs, command, results);
    write_files(options.output, {{kResultsName, results}, {kManifestName, manifest}});
  } catch (const std::exception&) {
    write_error = std::current_exception();
  }
  if (!options.quiet) out << table(options, runs);
  if (write_error) {
    out.flush();
    std::rethrow_exception(write_error);
  }
  if (!options.quiet) {
    out << "\nwrote " << (options.output / kResultsName).string() << " and "
        << (options.output / kManifestName).string() << '\n';
  }
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
