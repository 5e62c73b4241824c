#include <ATen/TensorOperators.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "driver/error.h"
#include "driver/inputs.h"

namespace miniquant::driver {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

// Three tokens of four columns, all `value`, as if read from a file.
Problem problem_of(double value, at::ScalarType dtype = at::kFloat) {
  Problem problem;
  problem.name = "file";
  problem.weight = at::ones({2, 4}, dtype);
  problem.inputs = at::ones({3, 4}, dtype) * value;
  problem.input_origin.file = "x.safetensors";
  problem.input_origin.tensor = "tokens";
  return problem;
}

Options with_ridge(double ridge) {
  Options options;
  options.gptq.ridge = ridge;
  return options;
}

Options with_ridge_from_data() {
  Options options;
  options.ridge_from_data = true;
  return options;
}

std::string error_of(const Problem& problem, const Options& options = {}) {
  try {
    check_inputs(problem, options);
  } catch (const InputError& error) {
    return error.what();
  }
  return "no error";
}

TEST(Inputs, WhatFloat32HoldsIsAccepted) {
  for (const double value : {0.0, 1e-18, 1.0, 1e18}) EXPECT_EQ(error_of(problem_of(value)), "no error") << value;
  for (const double value : {1e-150, 1e30, 1e150}) {
    EXPECT_EQ(error_of(problem_of(value, at::kDouble)), "no error") << value;
  }
  // A column that is small beside another counts as 0.
  Problem problem = problem_of(1.0);
  problem.inputs.select(1, 2).fill_(1e-30);
  EXPECT_EQ(error_of(problem), "no error");
}

TEST(Inputs, SquaresBeyondTheRangeAreNamed) {
  Problem problem = problem_of(1.0);
  problem.inputs.select(1, 2).fill_(1e30);
  EXPECT_EQ(
      error_of(problem),
      "--inputs: x.safetensors: tensor 'tokens': the squares of the inputs are summed in float32: expected at most "
      "3.40282e+38 in every column, but got 3e+60 in column 2; scale the inputs down");
  EXPECT_EQ(error_of(problem_of(1e-30)),
            "--inputs: x.safetensors: tensor 'tokens': the squares of the inputs are summed in float32: expected at "
            "least 1.17549e-38 in one column, but got at most 3e-60; scale the inputs up");
  EXPECT_THAT(error_of(problem_of(1e200, at::kDouble)), HasSubstr("summed in float64: expected at most 1.79769e+308"));
  // The sum overflows; each square is within the range.
  EXPECT_EQ(error_of(problem_of(1.2e19)).substr(0, 9), "--inputs:");
}

TEST(Inputs, FreshInputsAreCheckedAsWell) {
  Problem problem = problem_of(1.0);
  problem.fresh_inputs = at::ones({5, 4}) * 1e30;
  problem.fresh_input_origin = TensorOrigin{"y.safetensors", "more", "", "F32", {5, 4}, ""};
  EXPECT_THAT(error_of(problem), StartsWith("--fresh-inputs: y.safetensors: tensor 'more': the squares of the inputs"));
  problem.fresh_input_origin = TensorOrigin{};
  EXPECT_THAT(error_of(problem), StartsWith("the inputs from random numbers: the squares of the inputs"));
}

TEST(Inputs, ARidgeThatNoDiagonalHoldsIsNamed) {
  EXPECT_EQ(error_of(problem_of(2.0), with_ridge(1e37)), "no error");
  EXPECT_EQ(error_of(problem_of(2.0), with_ridge(1e40)),
            "--ridge: expected at most 8.50706e+37, with which the diagonal of H stays within float32, but got 1e+40");
  EXPECT_EQ(error_of(problem_of(2.0, at::kDouble), with_ridge(1e40)), "no error");
  // The ridge is relative to a mean of 0.
  EXPECT_EQ(error_of(problem_of(0.0), with_ridge(1e40)), "no error");
}

TEST(Inputs, ARidgeFromTheDataNeedsData) {
  EXPECT_EQ(error_of(problem_of(1.0), with_ridge_from_data()), "no error");
  EXPECT_EQ(error_of(problem_of(0.0), with_ridge_from_data()),
            "--inputs: x.safetensors: tensor 'tokens': expected a value other than 0 for --ridge auto, but all are 0");
  Problem problem = problem_of(1.0);
  problem.inputs = problem.inputs.narrow(0, 0, 1);
  EXPECT_EQ(error_of(problem, with_ridge_from_data()),
            "--ridge: expected at least 2 calibration tokens with auto (one for each half), but got 1");
}

}  // namespace
}  // namespace miniquant::driver
