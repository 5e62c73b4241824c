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

/// The distribution of the synthetic layer's inputs.
enum class Distribution { kNormal, kCauchy };

/// "normal" or "cauchy".
[[nodiscard]] std::string_view name_of(Distribution distribution);

/// A layer from random numbers; the defaults are the lab's.
struct SyntheticSource {
  int64_t rows = 768;
  int64_t columns = 768;
  int64_t tokens = 128;
  int64_t fresh_tokens = 8192;
  uint64_t seed = 42;
  std::vector<Distribution> distributions = {Distribution::kNormal, Distribution::kCauchy};
};

/// A layer from safetensors files. An empty tensor name means the file's only tensor.
struct FileSource {
  std::filesystem::path weights;
  std::string tensor;
  std::filesystem::path inputs;
  std::string input_tensor;
  std::filesystem::path fresh_inputs;  ///< empty: none
  std::string fresh_input_tensor;      ///< empty: the only tensor of its file, otherwise the name of the inputs' tensor
};

/// The preset with the options that all schemes of a run share, from `terms`: bits, group size, symmetry, ridge and
/// block size. An asymmetric grid has every code, so the full range of a preset does not apply to it.
[[nodiscard]] GptqOptions preset_on_terms(Preset preset, const GptqOptions& terms);

struct Options {
  std::variant<SyntheticSource, FileSource> source;
  Preset preset = Preset::kPlain;                         ///< the start of `gptq`
  GptqOptions gptq;                                       ///< the preset's, changed by the command line
  GptqOptions best = preset_on_terms(Preset::kBest, {});  ///< the best preset on the terms of `gptq`
  bool ridge_from_data = false;                           ///< choose_ridge() for every run, instead of gptq.ridge
  std::filesystem::path output = "gptq-toy";
  std::filesystem::path save;  ///< file for the layer quantized by `gptq`; empty: none
  int threads = 0;             ///< 0: LibTorch's default
  bool check = false;
  bool quiet = false;
};

/// The command line asks for a text (help, version), not a run.
struct Information {
  std::string text;
};

/// Parses a command line; `arguments` excludes the program's name. Throws InputError that names the option, the
/// requirement and the value.
[[nodiscard]] std::variant<Options, Information> parse_options(const std::vector<std::string>& arguments);

}  // namespace miniquant::driver
