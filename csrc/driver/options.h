#pragma once

#include <miniquant/options.h>
#include <miniquant/presets.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace miniquant::driver {

/// What the synthetic layer's inputs are drawn from.
enum class Distribution { kNormal, kCauchy };

/// "normal" or "cauchy".
[[nodiscard]] std::string_view name_of(Distribution distribution);

/// A layer drawn from random numbers; the defaults are the lab's.
struct SyntheticSource {
  int64_t rows = 768;
  int64_t columns = 768;
  int64_t tokens = 128;
  int64_t fresh_tokens = 8192;
  uint64_t seed = 42;
  std::vector<Distribution> distributions = {Distribution::kNormal, Distribution::kCauchy};
};

/// A layer from safetensors files. An empty tensor name means the only tensor of its file.
struct FileSource {
  std::filesystem::path weights;
  std::string tensor;
  std::filesystem::path inputs;
  std::string input_tensor;
  std::filesystem::path fresh_inputs;  ///< empty: none
  std::string fresh_input_tensor;      ///< empty: the only tensor of its file, else the name of the inputs' tensor
};

/// The preset with what is the same for every scheme of a run: bits, group size, symmetry, ridge and block size of
/// `terms`. An asymmetric grid has every code: there the full range of a preset does not apply.
[[nodiscard]] GptqOptions preset_on_terms(Preset preset, const GptqOptions& terms);

struct Options {
  std::variant<SyntheticSource, FileSource> source;
  Preset preset = Preset::kPlain;                         ///< what `gptq` started from
  GptqOptions gptq;                                       ///< the preset's, and what the command line says otherwise
  GptqOptions best = preset_on_terms(Preset::kBest, {});  ///< the best preset on the terms of `gptq`
  bool ridge_from_data = false;                           ///< choose_ridge() for every run, in place of gptq.ridge
  std::filesystem::path output = "gptq-toy";
  std::filesystem::path save;  ///< file for the layer as quantized by `gptq`; empty: none
  int threads = 0;             ///< 0: what LibTorch chooses
  bool check = false;
  bool quiet = false;
};

/// The command line asks for a text (help, version) instead of a run.
struct Information {
  std::string text;
};

/// Reads a command line, `arguments` being what follows the program's name.
/// Throws InputError that names the option, what was expected and what came.
[[nodiscard]] std::variant<Options, Information> parse_options(const std::vector<std::string>& arguments);

}  // namespace miniquant::driver
