#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <miniquant/build.h>

#include "driver/error.h"
#include "driver/options.h"

namespace miniquant::driver {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

using Arguments = std::vector<std::string>;

Options parsed(const Arguments& arguments) { return std::get<Options>(parse_options(arguments)); }

std::string parse_error(const Arguments& arguments) {
  try {
    static_cast<void>(parse_options(arguments));
  } catch (const InputError& error) {
    return error.what();
  }
  return "no error";
}

TEST(Options, DefaultsAreTheLab) {
  const Options options = parsed({});
  const auto& source = std::get<SyntheticSource>(options.source);
  EXPECT_EQ(source.rows, 768);
  EXPECT_EQ(source.columns, 768);
  EXPECT_EQ(source.tokens, 128);
  EXPECT_EQ(source.fresh_tokens, 8192);
  EXPECT_EQ(source.seed, 42U);
  EXPECT_THAT(source.distributions, ElementsAre(Distribution::kNormal, Distribution::kCauchy));
  EXPECT_EQ(options.gptq.bits, 4);
  EXPECT_EQ(options.gptq.group_size, 64);
  EXPECT_TRUE(options.gptq.symmetric);
  EXPECT_EQ(options.gptq.ridge, 0.01);
  EXPECT_FALSE(options.ridge_from_data);
  EXPECT_EQ(options.gptq.block_size, 128);
  EXPECT_EQ(options.gptq.column_order, ColumnOrder::kNatural);
  EXPECT_EQ(options.gptq.group_scales, GroupScales::kStatic);
  EXPECT_EQ(options.preset, Preset::kPlain);
  EXPECT_EQ(options.gptq.scale_method, ScaleMethod::kAbsmax);
  EXPECT_FALSE(options.gptq.full_range);
  EXPECT_EQ(options.gptq.refine, 0);
  EXPECT_EQ(options.output, "gptq-toy");
  EXPECT_EQ(options.threads, 0);
  EXPECT_FALSE(options.check);
  EXPECT_FALSE(options.quiet);
  EXPECT_EQ(options.save, "");
}

TEST(Options, EverythingCanBeSaid) {
  const Options options = parsed({"--rows",
                                  "5",
                                  "--columns",
                                  "010",
                                  "--tokens",
                                  "7",
                                  "--fresh-tokens",
                                  "0",
                                  "--seed",
                                  "0",
                                  "--bits",
                                  "3",
                                  "--group-size",
                                  "-1",
                                  "--asymmetric",
                                  "--ridge",
                                  "1e-3",
                                  "--block-size",
                                  "9",
                                  "--group-scales",
                                  "dynamic",
                                  "--distribution",
                                  "cauchy",
                                  "--output",
                                  "a/b",
                                  "--threads",
                                  "2",
                                  "--check",
                                  "--quiet"});
  const auto& source = std::get<SyntheticSource>(options.source);
  EXPECT_EQ(source.rows, 5);
  EXPECT_EQ(source.columns, 10);
  EXPECT_EQ(source.tokens, 7);
  EXPECT_EQ(source.fresh_tokens, 0);
  EXPECT_EQ(source.seed, 0U);
  EXPECT_THAT(source.distributions, ElementsAre(Distribution::kCauchy));
  EXPECT_EQ(options.gptq.bits, 3);
  EXPECT_EQ(options.gptq.group_size, -1);
  EXPECT_FALSE(options.gptq.symmetric);
  EXPECT_EQ(options.gptq.ridge, 1e-3);
  EXPECT_EQ(options.gptq.block_size, 9);
  EXPECT_EQ(options.gptq.group_scales, GroupScales::kDynamic);
  EXPECT_EQ(options.output, "a/b");
  EXPECT_EQ(options.threads, 2);
  EXPECT_TRUE(options.check);
  EXPECT_TRUE(options.quiet);
  EXPECT_EQ(parsed({"--column-order", "activation"}).gptq.column_order, ColumnOrder::kActivation);
  EXPECT_FALSE(parsed({"--no-symmetric"}).gptq.symmetric);
  EXPECT_TRUE(parsed({"--symmetric"}).gptq.symmetric);
  EXPECT_EQ(parsed({"--seed=9223372036854775807"}).output, "gptq-toy");
  EXPECT_EQ(parsed({"--distribution", "normal", "--save", "a/b.safetensors"}).save, "a/b.safetensors");
  EXPECT_EQ(parsed({"--weights", "w", "--inputs", "x", "--save", "f"}).save, "f");
}

void expect_same_choices(const GptqOptions& actual, const GptqOptions& expected) {
  EXPECT_EQ(actual.column_order, expected.column_order);
  EXPECT_EQ(actual.group_scales, expected.group_scales);
  EXPECT_EQ(actual.scale_method, expected.scale_method);
  EXPECT_EQ(actual.full_range, expected.full_range);
  EXPECT_EQ(actual.beam_scales, expected.beam_scales);
  EXPECT_EQ(actual.refine, expected.refine);
}

TEST(Options, PresetsAreTheLibrarys) {
  for (const Preset preset : {Preset::kPlain, Preset::kFast, Preset::kBest}) {
    const Options options = parsed({"--bits", "3", "--ridge", "0.5", "--preset", std::string(name_of(preset)),
                                    "--group-size", "32", "--block-size", "9"});
    EXPECT_EQ(options.preset, preset);
    expect_same_choices(options.gptq, options_of(preset));
    EXPECT_EQ(options.gptq.bits, 3);
    EXPECT_EQ(options.gptq.ridge, 0.5);
    EXPECT_EQ(options.gptq.group_size, 32);
    EXPECT_EQ(options.gptq.block_size, 9);
  }
}

// An option overrides the preset, wherever it stands, and changes nothing else.
TEST(Options, EachOptionGoesOverThePreset) {
  const auto expect = [](const Arguments& arguments, const GptqOptions& expected) {
    expect_same_choices(parsed(arguments).gptq, expected);
  };
  GptqOptions best = options_of(Preset::kBest);
  best.column_order = ColumnOrder::kNatural;
  expect({"--column-order", "natural", "--preset", "best"}, best);
  best = options_of(Preset::kBest);
  best.beam_scales = 3;
  expect({"--beam-scales", "3", "--preset", "best"}, best);
  best.beam_scales = 0;
  best.scale_method = ScaleMethod::kAbsmax;
  expect({"--preset", "best", "--scale-method", "absmax", "--beam-scales", "0"}, best);
  best.group_scales = GroupScales::kStatic;
  expect({"--preset", "best", "--scale-method", "absmax", "--beam-scales", "0", "--group-scales", "static"}, best);
  best = options_of(Preset::kBest);
  best.full_range = false;
  expect({"--no-full-range", "--preset", "best"}, best);
  best = options_of(Preset::kBest);
  best.refine = 0;
  expect({"--preset", "best", "--refine", "0"}, best);

  GptqOptions lab;
  lab.column_order = ColumnOrder::kGroup;
  expect({"--column-order", "group"}, lab);
  lab = {};
  lab.scale_method = ScaleMethod::kHessian;
  expect({"--scale-method", "hessian"}, lab);
  lab.scale_method = ScaleMethod::kMse;
  expect({"--scale-method", "mse"}, lab);
  lab = {};
  lab.full_range = true;
  expect({"--full-range"}, lab);
  lab = {};
  lab.refine = 3;
  expect({"--refine", "3"}, lab);
}

TEST(Options, ARidgeIsANumberOrFromTheData) {
  EXPECT_TRUE(parsed({"--ridge", "auto"}).ridge_from_data);
  EXPECT_TRUE(parsed({"--preset", "best", "--ridge=auto"}).ridge_from_data);
  const Options number = parsed({"--ridge", "0"});
  EXPECT_FALSE(number.ridge_from_data);
  EXPECT_EQ(number.gptq.ridge, 0.0);
}

TEST(Options, AnAsymmetricGridHasNoFullRange) {
  GptqOptions best = options_of(Preset::kBest);
  best.full_range = false;
  const Options options = parsed({"--preset", "best", "--asymmetric"});
  EXPECT_FALSE(options.gptq.symmetric);
  expect_same_choices(options.gptq, best);
  expect_same_choices(parsed({"--preset", "best", "--asymmetric", "--no-full-range"}).gptq, best);
}

TEST(Options, Files) {
  const Options options = parsed({"--weights", "w", "--tensor", "t", "--inputs", "i", "--input-tensor", "x",
                                  "--fresh-inputs", "f", "--fresh-input-tensor", "y", "--bits", "2"});
  const auto& source = std::get<FileSource>(options.source);
  EXPECT_EQ(source.weights, "w");
  EXPECT_EQ(source.tensor, "t");
  EXPECT_EQ(source.inputs, "i");
  EXPECT_EQ(source.input_tensor, "x");
  EXPECT_EQ(source.fresh_inputs, "f");
  EXPECT_EQ(source.fresh_input_tensor, "y");
  EXPECT_EQ(options.gptq.bits, 2);
}

TEST(Options, BadValuesAreNamed) {
  struct Case {
    Arguments arguments;
    std::string message;
  };
  const std::vector<Case> cases = {
      {{"--bits", "1"}, "--bits: expected an integer from 2 to 8, but got '1'"},
      {{"--bits", "9"}, "--bits: expected an integer from 2 to 8, but got '9'"},
      {{"--bits", "4.0"}, "--bits: expected an integer from 2 to 8, but got '4.0'"},
      {{"--bits", "four"}, "--bits: expected an integer from 2 to 8, but got 'four'"},
      {{"--rows", "0"}, "--rows: expected an integer from 1 to 16777216, but got '0'"},
      {{"--columns", "-3"}, "--columns: expected an integer from 1 to 16777216, but got '-3'"},
      {{"--tokens", "0"}, "--tokens: expected an integer from 1 to 16777216, but got '0'"},
      {{"--fresh-tokens", "-1"}, "--fresh-tokens: expected an integer from 0 to 16777216, but got '-1'"},
      {{"--tokens", "99999999999999999999"}, "--tokens: expected an integer from 1 to 16777216, but got '999"},
      {{"--seed", "-1"}, "--seed: expected an integer from 0 to 9223372036854775807, but got '-1'"},
      {{"--group-size", "0"}, "--group-size: expected a positive integer, or -1 for one group per row, but got '0'"},
      {{"--group-size", "-2"}, "--group-size: expected a positive integer, or -1 for one group per row, but got '-2'"},
      {{"--ridge", "-0.1"}, "--ridge: expected a finite number of at least 0, or auto, but got '-0.1'"},
      {{"--ridge", "nan"}, "--ridge: expected a finite number of at least 0, or auto, but got 'nan'"},
      {{"--ridge", "inf"}, "--ridge: expected a finite number of at least 0, or auto, but got 'inf'"},
      {{"--ridge", "1e-2x"}, "--ridge: expected a finite number of at least 0, or auto, but got '1e-2x'"},
      {{"--ridge", "foo"}, "--ridge: expected a finite number of at least 0, or auto, but got 'foo'"},
      {{"--ridge", "Auto"}, "--ridge: expected a finite number of at least 0, or auto, but got 'Auto'"},
      {{"--ridge", ""}, "--ridge: expected a finite number of at least 0, or auto, but got ''"},
      {{"--block-size", "0"}, "--block-size: expected an integer from 1 to 16777216, but got '0'"},
      {{"--column-order", "random"}, "--column-order: expected one of natural, activation, group, but got 'random'"},
      {{"--group-scales", "Static"}, "--group-scales: expected one of static, dynamic, but got 'Static'"},
      {{"--distribution", "uniform"}, "--distribution: expected one of normal, cauchy, both, but got 'uniform'"},
      {{"--threads", "0"}, "--threads: expected an integer from 1 to 1024, but got '0'"},
      {{"--output", ""}, "--output: expected a name, but got an empty one"},
      {{"--weights", "w", "--inputs", "i", "--tensor", ""}, "--tensor: expected a name, but got an empty one"},
      {{"--weights", "w"}, "--weights: expected --inputs with it, but it is missing"},
      {{"--inputs", "i"}, "--inputs: expected --weights with it, but it is missing"},
      {{"--tensor", "t"}, "--tensor: expected --weights with it, but it is missing"},
      {{"--fresh-inputs", "f"}, "--fresh-inputs: expected --weights with it, but it is missing"},
      {{"--weights", "w", "--inputs", "i", "--fresh-input-tensor", "y"},
       "--fresh-input-tensor: expected --fresh-inputs with it, but it is missing"},
      {{"--weights", "w", "--inputs", "i", "--rows", "3"},
       "--rows: not allowed with --weights, because the files determine it"},
      {{"--weights", "w", "--inputs", "i", "--seed", "3"},
       "--seed: not allowed with --weights, because the files determine it"},
      {{"--weights", "w", "--inputs", "i", "--distribution", "both"},
       "--distribution: not allowed with --weights, because the files determine it"},
      {{"--group-scales", "dynamic", "--column-order", "activation"},
       "--group-scales: expected static with --column-order activation, but got dynamic"},
      {{"--preset", "best", "--column-order", "activation"},
       "--group-scales: expected static with --column-order activation, but got dynamic (of --preset best)"},
      {{"--preset", "fast", "--group-scales", "dynamic"},
       "--group-scales: expected static with --column-order activation (of --preset fast), but got dynamic"},
      {{"--scale-method", "loss"},
       "--scale-method: expected absmax, mse or hessian with --group-scales static (of --preset plain), but got loss"},
      {{"--preset", "best", "--group-scales", "static"},
       "--scale-method: expected absmax, mse or hessian with --group-scales static, but got loss (of --preset best)"},
      {{"--group-scales", "dynamic", "--scale-method", "mse"},
       "--scale-method: expected absmax or loss with --group-scales dynamic, but got mse"},
      {{"--preset", "best", "--scale-method", "hessian"},
       "--scale-method: expected absmax or loss with --group-scales dynamic (of --preset best), but got hessian"},
      {{"--preset", "best", "--scale-method", "absmax"},
       "--beam-scales: expected 0 with --scale-method absmax, but got 2 (of --preset best)"},
      {{"--beam-scales", "2"}, "--beam-scales: expected 0 with --scale-method absmax (of --preset plain), but got 2"},
      {{"--beam-scales", "26"}, "--beam-scales: expected an integer from 0 to 25, but got '26'"},
      {{"--full-range", "--asymmetric"},
       "--full-range: not allowed with --asymmetric, because an asymmetric grid already uses every code"},
      {{"--preset", "best", "--full-range", "--no-symmetric"}, "--full-range: not allowed with --asymmetric"},
      {{"--preset", "best", "--check"},
       "--check: expected --scale-method absmax, mse or hessian, which the textbook form has, but got loss (of "
       "--preset best)"},
      {{"--refine", "2", "--check"},
       "--check: expected --refine 0, because the textbook form does not refine, but got 2"},
      {{"--preset", "worst"}, "--preset: expected one of plain, fast, best, but got 'worst'"},
      {{"--scale-method", "max"}, "--scale-method: expected one of absmax, mse, hessian, loss, but got 'max'"},
      {{"--save", "f"}, "--save: expected one run, by --distribution normal or --distribution cauchy, but got both"},
      {{"--save", "", "--distribution", "normal"}, "--save: expected a name, but got an empty one"},
      {{"--refine", "-1"}, "--refine: expected an integer from 0 to 1024, but got '-1'"},
  };
  for (const Case& c : cases) EXPECT_THAT(parse_error(c.arguments), StartsWith(c.message)) << c.message;
}

// CLI11 words these messages, and its versions differ; all of them name the option.
TEST(Options, UnknownAndIncompleteOptionsAreNamed) {
  EXPECT_THAT(parse_error({"--bitz", "4"}), HasSubstr("--bitz"));
  EXPECT_THAT(parse_error({"stray"}), HasSubstr("stray"));
  EXPECT_THAT(parse_error({"--bits"}), HasSubstr("--bits"));
  EXPECT_THAT(parse_error({"--bits", "4", "--bits", "5"}), HasSubstr("--bits"));
}

TEST(Options, HelpAndVersion) {
  const std::string help = std::get<Information>(parse_options({"--help"})).text;
  for (const char* option :
       {"--rows",         "--columns",    "--tokens",       "--fresh-tokens", "--seed",         "--distribution",
        "--weights",      "--tensor",     "--inputs",       "--input-tensor", "--fresh-inputs", "--fresh-input-tensor",
        "--bits",         "--group-size", "--asymmetric",   "--ridge",        "--block-size",   "--column-order",
        "--group-scales", "--preset",     "--scale-method", "--full-range",   "--refine",       "--beam-scales",
        "--output",       "--threads",    "--check",        "--quiet",        "--save",         "--version",
        "Examples:",      "Exit codes:"}) {
    EXPECT_THAT(help, HasSubstr(option));
  }
  EXPECT_THAT(help, testing::Not(HasSubstr("{false}")));
  EXPECT_THAT(std::get<Information>(parse_options({"--version"})).text,
              testing::MatchesRegex("gptq_toy [0-9.]+ \\(torch 2\\..*, instruction set " +
                                    std::string(instruction_set()) + "\\)\n"));
}

}  // namespace
}  // namespace miniquant::driver
