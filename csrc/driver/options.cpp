#include "driver/options.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <sstream>
#include <utility>

#include "driver/build_info.h"
#include "driver/error.h"

namespace miniquant::driver {
namespace {

constexpr std::string_view kDescription =
    "Compares round to nearest (RTN) with GPTQ on one linear layer. Without options: the lab's layer, on normal and "
    "on\n"
    "Cauchy inputs. Prints a table and writes results.json (the figures) and manifest.json (how they were made).";

constexpr std::string_view kExamples = R"(Examples:
  gptq_toy
      the lab: W 768 x 768, 128 calibration tokens, 4 bits, groups of 64, seed 42
  gptq_toy --rows 256 --columns 1024 --bits 3 --group-size 128 --distribution normal --output run3
      another layer on a coarser grid; the two files go into the folder run3
  gptq_toy --column-order activation --check
      columns in descending diag(H); also compares with the textbook implementation
  gptq_toy --weights layer.safetensors --tensor fc.weight --inputs tokens.safetensors --fresh-inputs held_out.safetensors
      a real layer [N, K] on its real inputs [..., K]

Exit codes: 0 done; 1 could not be computed or written, or --check found a difference; 2 bad option or input file.)";

// For transform(): leaves the canonical decimal form behind, so that "010" is ten wherever it is read next.
CLI::Validator integer_from(int64_t low, int64_t high) {
  const auto check = [low, high](std::string& text) -> std::string {
    int64_t value = 0;
    const char* first = text.data();
    const char* last = text.data() + text.size();
    const auto [end, error] = std::from_chars(first, last, value);
    if (error != std::errc() || end != last || value < low || value > high) {
      return "expected an integer from " + std::to_string(low) + " to " + std::to_string(high) + ", but got '" + text +
             "'";
    }
    text = std::to_string(value);
    return {};
  };
  return {check, "", "integer"};
}

CLI::Validator group_size() {
  const CLI::Validator positive = integer_from(1, std::numeric_limits<int32_t>::max());
  const auto check = [positive](std::string& text) -> std::string {
    if (text == "-1" || positive(text).empty()) return {};
    return "expected a positive integer, or -1 for one group per row, but got '" + text + "'";
  };
  return {check, "", "group size"};
}

CLI::Validator non_negative_number() {
  const auto check = [](std::string& text) -> std::string {
    double value = 0.0;
    const char* last = text.data() + text.size();
    const auto [end, error] = std::from_chars(text.data(), last, value);
    if (error == std::errc() && end == last && std::isfinite(value) && value >= 0.0) return {};
    return "expected a finite number of at least 0, but got '" + text + "'";
  };
  return {check, "", "number"};
}

CLI::Validator not_empty() {
  const auto check = [](std::string& text) -> std::string {
    return text.empty() ? "expected a name, but got an empty one" : std::string();
  };
  return {check, "", "name"};
}

template <typename T>
using Choices = std::vector<std::pair<std::string, T>>;

template <typename T>
std::string joined(const Choices<T>& choices, std::string_view separator) {
  std::string text;
  for (const auto& [name, value] : choices) text += (text.empty() ? "" : std::string(separator)) + name;
  return text;
}

// An option that takes one of a few words.
template <typename T>
CLI::Option* add_choice(CLI::App& app, const std::string& name, T& target, const Choices<T>& choices,
                        const std::string& description) {
  const auto check = [choices](std::string& text) -> std::string {
    const bool known = std::ranges::any_of(choices, [&](const auto& c) { return c.first == text; });
    return known ? std::string() : "expected one of " + joined(choices, ", ") + ", but got '" + text + "'";
  };
  const auto assign = [&target, choices](const std::string& text) {
    for (const auto& [word, value] : choices) {
      if (word == text) target = value;
    }
  };
  return app.add_option_function<std::string>(name, assign, description)
      ->type_name("{" + joined(choices, ",") + "}")
      ->check(CLI::Validator(check, "", "choice"));
}

constexpr int64_t kMaxSize = 16'777'216;
constexpr int kMaxThreads = 1024;

struct Parsed {
  Options options;
  SyntheticSource synthetic;
  FileSource file;
};

void add_layer_options(CLI::App& app, SyntheticSource& source) {
  const std::string group = "Layer from random numbers";
  const auto add = [&](const std::string& name, int64_t& target, int64_t low, const std::string& description) {
    app.add_option(name, target, description)
        ->type_name("INT")
        ->capture_default_str()
        ->group(group)
        ->transform(integer_from(low, kMaxSize));
  };
  add("--rows", source.rows, 1, "output features N");
  add("--columns", source.columns, 1, "input features K");
  add("--tokens", source.tokens, 1, "calibration inputs n");
  add("--fresh-tokens", source.fresh_tokens, 0, "inputs that calibration does not see; 0: none");
  app.add_option("--seed", source.seed, "of the random numbers")
      ->type_name("INT")
      ->capture_default_str()
      ->group(group)
      ->transform(integer_from(0, std::numeric_limits<int64_t>::max()));
  using Distributions = std::vector<Distribution>;
  const Choices<Distributions> distributions = {{"normal", {Distribution::kNormal}},
                                                {"cauchy", {Distribution::kCauchy}},
                                                {"both", {Distribution::kNormal, Distribution::kCauchy}}};
  add_choice(app, "--distribution", source.distributions, distributions, "of the inputs, one run each")
      ->default_str("both")
      ->group(group);
}

void add_file_options(CLI::App& app, FileSource& source) {
  const std::string group = "Layer from safetensors files (F64, F32, F16, BF16)";
  CLI::Option* weights = app.add_option("--weights", source.weights, "file with the weight [N, K]");
  CLI::Option* tensor = app.add_option("--tensor", source.tensor, "name of the weight; may be left out if it is alone");
  CLI::Option* inputs = app.add_option("--inputs", source.inputs, "file with calibration inputs [..., K]");
  CLI::Option* input_tensor =
      app.add_option("--input-tensor", source.input_tensor, "name of the inputs; may be left out if they are alone");
  CLI::Option* fresh = app.add_option("--fresh-inputs", source.fresh_inputs, "file with inputs for the fresh figures");
  CLI::Option* fresh_tensor = app.add_option("--fresh-input-tensor", source.fresh_input_tensor,
                                             "name of the fresh inputs; else the only one, or that of --input-tensor");
  for (CLI::Option* option : {weights, inputs, fresh}) option->type_name("FILE");
  for (CLI::Option* option : {tensor, input_tensor, fresh_tensor}) option->type_name("NAME");
  for (CLI::Option* option : {weights, tensor, inputs, input_tensor, fresh, fresh_tensor}) {
    option->group(group)->check(not_empty());
  }
}

void add_quantization_options(CLI::App& app, GptqOptions& gptq) {
  const std::string group = "Quantization";
  app.add_option("--bits", gptq.bits, "per weight, 2 to 8")
      ->type_name("INT")
      ->capture_default_str()
      ->group(group)
      ->transform(integer_from(2, 8));
  app.add_option("--group-size", gptq.group_size, "columns per scale; -1: one scale per row")
      ->type_name("INT")
      ->capture_default_str()
      ->group(group)
      ->check(group_size());
  app.add_flag("--symmetric,!--no-symmetric,!--asymmetric", gptq.symmetric,
               "zero points at 0 (the default), or --asymmetric: zero points of their own")
      ->group(group);
  app.add_option("--ridge", gptq.ridge, "added to diag(H), relative to its mean")
      ->type_name("FLOAT")
      ->default_str("0.01")
      ->group(group)
      ->check(non_negative_number());
  app.add_option("--block-size", gptq.block_size, "columns per block of the sweep; changes time only")
      ->type_name("INT")
      ->capture_default_str()
      ->group(group)
      ->transform(integer_from(1, kMaxSize));
  add_choice(app, "--column-order", gptq.column_order,
             {{"natural", ColumnOrder::kNatural}, {"activation", ColumnOrder::kActivation}},
             "left to right, or descending diag(H)")
      ->default_str("natural")
      ->group(group);
  add_choice(app, "--group-scales", gptq.group_scales,
             {{"static", GroupScales::kStatic}, {"dynamic", GroupScales::kDynamic}},
             "from the original weights, or from the weights as updated when the group is reached")
      ->default_str("static")
      ->group(group);
}

void check_combinations(const CLI::App& app, const Options& options) {
  const auto given = [&](const char* name) { return app.get_option(name)->count() > 0; };
  const bool from_files = given("--weights");
  if (from_files) {
    if (!given("--inputs")) throw InputError("--weights: expected --inputs with it, but it is missing");
    for (const char* name : {"--rows", "--columns", "--tokens", "--fresh-tokens", "--seed", "--distribution"}) {
      if (given(name)) throw InputError(std::string(name) + ": expected not with --weights, where files say it");
    }
    if (given("--fresh-input-tensor") && !given("--fresh-inputs")) {
      throw InputError("--fresh-input-tensor: expected --fresh-inputs with it, but it is missing");
    }
  } else {
    for (const char* name : {"--tensor", "--inputs", "--input-tensor", "--fresh-inputs", "--fresh-input-tensor"}) {
      if (given(name)) throw InputError(std::string(name) + ": expected --weights with it, but it is missing");
    }
  }
  if (options.gptq.group_scales == GroupScales::kDynamic && options.gptq.column_order == ColumnOrder::kActivation) {
    throw InputError("--group-scales: expected static with --column-order activation, but got dynamic");
  }
}

}  // namespace

std::string_view name_of(Distribution distribution) {
  return distribution == Distribution::kNormal ? "normal" : "cauchy";
}

std::variant<Options, Information> parse_options(const std::vector<std::string>& arguments) {
  Parsed parsed;
  CLI::App app{std::string(kDescription), "gptq_toy"};
  app.footer(std::string(kExamples));
  app.get_formatter()->column_width(34);
  app.set_version_flag("--version", "gptq_toy " + build_info().miniquant + " (torch " + build_info().torch + ")");
  add_layer_options(app, parsed.synthetic);
  add_file_options(app, parsed.file);
  add_quantization_options(app, parsed.options.gptq);
  app.add_option("--output", parsed.options.output, "folder for results.json and manifest.json; made if missing")
      ->type_name("DIR")
      ->capture_default_str()
      ->check(not_empty());
  app.add_option("--threads", parsed.options.threads, "the default is LibTorch's")
      ->type_name("INT")
      ->transform(integer_from(1, kMaxThreads));
  app.add_flag("--check", parsed.options.check, "compare with the textbook implementation, code for code");
  app.add_flag("--quiet", parsed.options.quiet, "print errors only");

  try {
    // CLI11 takes a vector from its back.
    app.parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));
  } catch (const CLI::Success& request) {
    std::ostringstream text;
    app.exit(request, text, text);
    return Information{text.str()};
  } catch (const CLI::ParseError& error) {
    throw InputError(error.what());
  }
  check_combinations(app, parsed.options);
  if (parsed.file.weights.empty()) {
    parsed.options.source = parsed.synthetic;
  } else {
    parsed.options.source = parsed.file;
  }
  return parsed.options;
}

}  // namespace miniquant::driver
