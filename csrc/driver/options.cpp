#include "driver/options.h"

#include <miniquant/build.h>
#include <miniquant/names.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <utility>

#include "driver/build_info.h"
#include "driver/error.h"

namespace miniquant::driver {
namespace {

constexpr std::string_view kDescription =
    "Compares round to nearest (RTN), GPTQ and GPTQ with the best preset on one linear layer. Without options: the\n"
    "lab's layer, on normal and on Cauchy inputs. Prints a table and writes results.json (the figures) and\n"
    "manifest.json (how they were made).";

constexpr std::string_view kExamples = R"(Examples:
  gptq_toy
      the lab: W 768 x 768, 128 calibration tokens, 4 bits, groups of 64, seed 42
  gptq_toy --rows 256 --columns 1024 --bits 3 --group-size 128 --distribution normal --output run3
      another layer on a coarser grid; results.json and manifest.json go into the folder run3
  gptq_toy --ridge auto
      the lab, each run with a ridge chosen from its inputs
  gptq_toy --preset fast --check
      GPTQ with the options of a preset, compared with the textbook implementation
  gptq_toy --preset best --distribution normal --save layer.safetensors
      also writes the quantized layer: codes, scales, zero points and the options used
  gptq_toy --column-order group --group-scales dynamic --scale-method loss
      other options for GPTQ, one by one
  gptq_toy --weights layer.safetensors --tensor fc.weight --inputs tokens.safetensors --fresh-inputs held_out.safetensors
      a real layer [N, K] on its real inputs [..., K]

Exit codes: 0 done; 1 could not be computed or written, or --check found a difference; 2 bad option or input file.)";

// For transform(): returns the canonical decimal form, so "010" is ten wherever it is read next.
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

constexpr std::string_view kFromData = "auto";

// The number; nullopt if the text is not a valid ridge.
std::optional<double> ridge_in(std::string_view text) {
  double value = 0.0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  return whole && std::isfinite(value) && value >= 0.0 ? std::optional(value) : std::nullopt;
}

CLI::Validator ridge() {
  const auto check = [](std::string& text) -> std::string {
    if (text == kFromData || ridge_in(text)) return {};
    return "expected a finite number of at least 0, or auto, but got '" + text + "'";
  };
  return {check, "", "ridge"};
}

CLI::Validator not_empty() {
  const auto check = [](std::string& text) -> std::string {
    return text.empty() ? "expected a name, but got an empty one" : std::string();
  };
  return {check, "", "name"};
}

// CLI11 appends "{false}" to names that turn a flag off.
class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_option_name(const CLI::Option* option, bool is_positional) const override {
    constexpr std::string_view kMark = "{false}";
    std::string name = CLI::Formatter::make_option_name(option, is_positional);
    for (size_t at = name.find(kMark); at != std::string::npos; at = name.find(kMark)) name.erase(at, kMark.size());
    return name;
  }
};

template <typename T>
using Choices = std::vector<std::pair<std::string, T>>;

template <typename T>
std::string joined(const Choices<T>& choices, std::string_view separator) {
  std::string text;
  for (const auto& [name, value] : choices) text += (text.empty() ? "" : std::string(separator)) + name;
  return text;
}

// Adds an option that takes one of a few words. `Target` is T, or std::optional<T> where it matters whether it was
// given.
template <typename Target, typename T>
CLI::Option* add_choice(CLI::App& app, const std::string& name, Target& target, const Choices<T>& choices,
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
constexpr int64_t kMaxRounds = 1024;

// Options that change the preset.
struct Overrides {
  std::optional<ColumnOrder> column_order;
  std::optional<GroupScales> group_scales;
  std::optional<ScaleMethod> scale_method;
  std::optional<int64_t> refine;
  std::optional<int64_t> beam_scales;
  bool full_range = false;
};

struct Parsed {
  Options options;
  Overrides overrides;
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
  add("--fresh-tokens", source.fresh_tokens, 0, "held-out inputs for the fresh figures; 0: none");
  app.add_option("--seed", source.seed, "seed of the random numbers")
      ->type_name("INT")
      ->capture_default_str()
      ->group(group)
      ->transform(integer_from(0, std::numeric_limits<int64_t>::max()));
  using Distributions = std::vector<Distribution>;
  const Choices<Distributions> distributions = {{"normal", {Distribution::kNormal}},
                                                {"cauchy", {Distribution::kCauchy}},
                                                {"both", {Distribution::kNormal, Distribution::kCauchy}}};
  add_choice(app, "--distribution", source.distributions, distributions, "distribution of the inputs, one run each")
      ->default_str("both")
      ->group(group);
}

void add_file_options(CLI::App& app, FileSource& source) {
  const std::string group = "Layer from safetensors files (F64, F32, F16, BF16)";
  CLI::Option* weights = app.add_option("--weights", source.weights, "file with the weight [N, K]");
  CLI::Option* tensor =
      app.add_option("--tensor", source.tensor, "name of the weight; optional where the file has one tensor");
  CLI::Option* inputs = app.add_option("--inputs", source.inputs, "file with calibration inputs [..., K]");
  CLI::Option* input_tensor = app.add_option("--input-tensor", source.input_tensor,
                                             "name of the inputs; optional where the file has one tensor");
  CLI::Option* fresh =
      app.add_option("--fresh-inputs", source.fresh_inputs, "file with held-out inputs [..., K] for the fresh figures");
  CLI::Option* fresh_tensor = app.add_option(
      "--fresh-input-tensor", source.fresh_input_tensor,
      "name of the fresh inputs; default: the only tensor of the file, otherwise that of --input-tensor");
  for (CLI::Option* option : {weights, inputs, fresh}) option->type_name("FILE");
  for (CLI::Option* option : {tensor, input_tensor, fresh_tensor}) option->type_name("NAME");
  for (CLI::Option* option : {weights, tensor, inputs, input_tensor, fresh, fresh_tensor}) {
    option->group(group)->check(not_empty());
  }
}

// The choices by the library's names.
template <typename T>
Choices<T> named(const std::vector<T>& values) {
  Choices<T> choices;
  for (const T value : values) choices.emplace_back(name_of(value), value);
  return choices;
}

void add_quantization_options(CLI::App& app, GptqOptions& gptq, bool& ridge_from_data) {
  const std::string group = "Quantization";
  app.add_option("--bits", gptq.bits, "bits per weight, 2 to 8")
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
               "zero points 0 (default); --asymmetric: a zero point per group")
      ->group(group);
  const auto assign_ridge = [&gptq, &ridge_from_data](const std::string& text) {
    ridge_from_data = text == kFromData;
    gptq.ridge = ridge_in(text).value_or(gptq.ridge);
  };
  app.add_option_function<std::string>("--ridge", assign_ridge,
                                       "added to diag(H), relative to its mean; auto: chosen from the inputs")
      ->type_name("FLOAT|auto")
      ->default_str("0.01")
      ->group(group)
      ->check(ridge());
  app.add_option("--block-size", gptq.block_size, "columns per block of the sweep; changes the time only")
      ->type_name("INT")
      ->capture_default_str()
      ->group(group)
      ->transform(integer_from(1, kMaxSize));
}

void add_gptq_options(CLI::App& app, Preset& preset, Overrides& overrides) {
  const std::string group = "GPTQ: a preset and changes to it";
  add_choice(app, "--preset", preset, named<Preset>({Preset::kPlain, Preset::kFast, Preset::kBest}),
             "the options to start from; the best preset is always computed as well")
      ->default_str("plain")
      ->group(group);
  add_choice(app, "--column-order", overrides.column_order,
             named<ColumnOrder>({ColumnOrder::kNatural, ColumnOrder::kActivation, ColumnOrder::kGroup}),
             "left to right; by descending diag(H); or whole groups by descending mean of diag(H)")
      ->group(group);
  add_choice(app, "--group-scales", overrides.group_scales,
             named<GroupScales>({GroupScales::kStatic, GroupScales::kDynamic}),
             "computed from the original weights, or from the updated weights when the group is reached")
      ->group(group);
  add_choice(
      app, "--scale-method", overrides.scale_method,
      named<ScaleMethod>({ScaleMethod::kAbsmax, ScaleMethod::kMse, ScaleMethod::kHessian, ScaleMethod::kLoss}),
      "absmax: holds the range; otherwise the best of several, by squared error (mse), error weighted by diag(H) "
      "(hessian) or loss (loss)")
      ->group(group);
  app.add_flag("--full-range,!--no-full-range", overrides.full_range,
               "symmetric grid with one more code on the negative side")
      ->group(group);
  app.add_option("--refine", overrides.refine, "max rounds of refinement after the sweep")
      ->type_name("INT")
      ->group(group)
      ->transform(integer_from(0, kMaxRounds));
  app.add_option("--beam-scales", overrides.beam_scales,
                 "number of the scales of --scale-method loss that a beam search of the codes tries")
      ->type_name("INT")
      ->group(group)
      ->transform(integer_from(0, kMostBeamScales));
}

bool is_given(const CLI::App& app, const char* name) { return app.get_option(name)->count() > 0; }

GptqOptions gptq_options(const CLI::App& app, Preset preset, const GptqOptions& terms, const Overrides& overrides) {
  GptqOptions options = preset_on_terms(preset, terms);
  options.column_order = overrides.column_order.value_or(options.column_order);
  options.group_scales = overrides.group_scales.value_or(options.group_scales);
  options.scale_method = overrides.scale_method.value_or(options.scale_method);
  options.refine = overrides.refine.value_or(options.refine);
  options.beam_scales = overrides.beam_scales.value_or(options.beam_scales);
  if (is_given(app, "--full-range")) options.full_range = overrides.full_range;
  return options;
}

// Rejects combinations that the library would reject, in the words of the command line.
void check_gptq_options(const CLI::App& app, const Options& options) {
  const GptqOptions& gptq = options.gptq;
  // "loss", or "loss (of --preset best)" if the preset set it.
  const auto said = [&](const char* name, std::string_view value) {
    std::string text(value);
    if (!is_given(app, name)) text.append(" (of --preset ").append(name_of(options.preset)).append(")");
    return text;
  };
  const std::string order = said("--column-order", name_of(gptq.column_order));
  const std::string scales = said("--group-scales", name_of(gptq.group_scales));
  const std::string method = said("--scale-method", name_of(gptq.scale_method));
  const bool dynamic = gptq.group_scales == GroupScales::kDynamic;
  const bool loss = gptq.scale_method == ScaleMethod::kLoss;
  if (dynamic && gptq.column_order == ColumnOrder::kActivation) {
    throw InputError("--group-scales: expected static with --column-order " + order + ", but got " + scales);
  }
  if (!dynamic && loss) {
    throw InputError("--scale-method: expected absmax, mse or hessian with --group-scales " + scales + ", but got " +
                     method);
  }
  if (dynamic && !loss && gptq.scale_method != ScaleMethod::kAbsmax) {
    throw InputError("--scale-method: expected absmax or loss with --group-scales " + scales + ", but got " + method);
  }
  if (!loss && gptq.beam_scales > 0) {
    throw InputError("--beam-scales: expected 0 with --scale-method " + method + ", but got " +
                     said("--beam-scales", std::to_string(gptq.beam_scales)));
  }
  if (gptq.full_range && !gptq.symmetric) {
    throw InputError("--full-range: not allowed with --asymmetric, because an asymmetric grid already uses every code");
  }
  if (options.check && loss) {
    throw InputError("--check: expected --scale-method absmax, mse or hessian, which the textbook form has, but got " +
                     method);
  }
  if (options.check && gptq.refine > 0) {
    throw InputError("--check: expected --refine 0, because the textbook form does not refine, but got " +
                     said("--refine", std::to_string(gptq.refine)));
  }
}

void check_combinations(const CLI::App& app, const Options& options) {
  const auto given = [&](const char* name) { return is_given(app, name); };
  const bool from_files = given("--weights");
  if (from_files) {
    if (!given("--inputs")) throw InputError("--weights: expected --inputs with it, but it is missing");
    for (const char* name : {"--rows", "--columns", "--tokens", "--fresh-tokens", "--seed", "--distribution"}) {
      if (given(name))
        throw InputError(std::string(name) + ": not allowed with --weights, because the files determine it");
    }
    if (given("--fresh-input-tensor") && !given("--fresh-inputs")) {
      throw InputError("--fresh-input-tensor: expected --fresh-inputs with it, but it is missing");
    }
  } else {
    for (const char* name : {"--tensor", "--inputs", "--input-tensor", "--fresh-inputs", "--fresh-input-tensor"}) {
      if (given(name)) throw InputError(std::string(name) + ": expected --weights with it, but it is missing");
    }
  }
  const auto* synthetic = std::get_if<SyntheticSource>(&options.source);
  if (given("--save") && synthetic != nullptr && synthetic->distributions.size() > 1) {
    throw InputError("--save: expected one run, by --distribution normal or --distribution cauchy, but got both");
  }
  check_gptq_options(app, options);
}

}  // namespace

std::string_view name_of(Distribution distribution) {
  return distribution == Distribution::kNormal ? "normal" : "cauchy";
}

GptqOptions preset_on_terms(Preset preset, const GptqOptions& terms) {
  GptqOptions options = options_of(preset);
  options.bits = terms.bits;
  options.group_size = terms.group_size;
  options.symmetric = terms.symmetric;
  options.full_range = options.full_range && terms.symmetric;
  options.ridge = terms.ridge;
  options.block_size = terms.block_size;
  return options;
}

namespace {

std::string version_text() {
  const BuildInfo& build = build_info();
  return "gptq_toy " + build.miniquant + " (torch " + build.torch + ", instruction set " +
         std::string(instruction_set()) + ")";
}

}  // namespace

std::variant<Options, Information> parse_options(const std::vector<std::string>& arguments) {
  Parsed parsed;
  CLI::App app{std::string(kDescription), "gptq_toy"};
  app.footer(std::string(kExamples));
  const auto formatter = std::make_shared<HelpFormatter>();
  formatter->column_width(34);
  app.formatter(formatter);
  app.set_version_flag("--version", [] { return version_text(); });
  add_layer_options(app, parsed.synthetic);
  add_file_options(app, parsed.file);
  GptqOptions terms;
  add_quantization_options(app, terms, parsed.options.ridge_from_data);
  add_gptq_options(app, parsed.options.preset, parsed.overrides);
  app.add_option("--output", parsed.options.output, "folder for results.json and manifest.json, created if missing")
      ->type_name("DIR")
      ->capture_default_str()
      ->check(not_empty());
  app.add_option("--save", parsed.options.save,
                 "safetensors file for the layer as GPTQ quantizes it (codes, scales, zero points); needs one run")
      ->type_name("FILE")
      ->check(not_empty());
  app.add_option("--threads", parsed.options.threads, "number of threads; default: LibTorch's")
      ->type_name("INT")
      ->transform(integer_from(1, kMaxThreads));
  app.add_flag("--check", parsed.options.check, "compare with the textbook implementation, code for code");
  app.add_flag("--quiet", parsed.options.quiet, "print errors only");

  try {
    // CLI11 takes a vector in reverse order.
    app.parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));
  } catch (const CLI::Success& request) {
    std::ostringstream text;
    app.exit(request, text, text);
    return Information{text.str()};
  } catch (const CLI::ParseError& error) {
    throw InputError(error.what());
  }
  parsed.options.gptq = gptq_options(app, parsed.options.preset, terms, parsed.overrides);
  parsed.options.best = preset_on_terms(Preset::kBest, parsed.options.gptq);
  if (parsed.file.weights.empty()) {
    parsed.options.source = parsed.synthetic;
  } else {
    parsed.options.source = parsed.file;
  }
  check_combinations(app, parsed.options);
  return parsed.options;
}

}  // namespace miniquant::driver
