#include "driver/inputs.h"

#include <ATen/ops/linalg_vector_norm.h>

#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

#include "driver/error.h"

namespace miniquant::driver {
namespace {

// The range of float32 or float64: the smallest normal number and the largest.
struct Range {
  std::string_view name;
  double low;
  double high;
};

Range range_of(at::ScalarType dtype) {
  if (dtype == at::kDouble) {
    return {.name = "float64", .low = std::numeric_limits<double>::min(), .high = std::numeric_limits<double>::max()};
  }
  return {.name = "float32", .low = std::numeric_limits<float>::min(), .high = std::numeric_limits<float>::max()};
}

std::string number(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

std::string where(std::string_view option, const TensorOrigin& origin) {
  if (origin.file.empty()) return "the inputs from random numbers";
  return std::string(option) + ": " + origin.file + ": tensor '" + origin.tensor + "'";
}

// [K] in float64: the sum of squares of every column over tokens.
at::Tensor sums_of_squares(const at::Tensor& inputs) {
  return at::linalg_vector_norm(inputs, /*ord=*/2, /*dim=*/0, /*keepdim=*/false, at::kDouble).square();
}

// Checks the sums of squares: the largest of them bounds every product of two columns.
void check_range(const std::string& where, const at::Tensor& squares, const Range& range) {
  const auto [largest, column] = squares.max(/*dim=*/0);
  const double value = largest.item<double>();
  const std::string expected = "the squares of the inputs are summed in " + std::string(range.name) + ": ";
  if (!(value <= range.high)) {
    throw InputError(where + ": " + expected + "expected at most " + number(range.high) + " in every column, but got " +
                     number(value) + " in column " + std::to_string(column.item<int64_t>()) +
                     "; scale the inputs down");
  }
  if (value > 0.0 && value < range.low) {
    throw InputError(where + ": " + expected + "expected at least " + number(range.low) +
                     " in one column, but got at most " + number(value) + "; scale the inputs up");
  }
}

void check_ridge(const at::Tensor& squares, double ridge, double tokens, const Range& range) {
  const double mean = squares.mean().item<double>() / tokens;
  const double largest = squares.max().item<double>() / tokens;
  if (largest + ridge * mean > range.high) {
    throw InputError("--ridge: expected at most " + number((range.high - largest) / mean) +
                     ", with which the diagonal of H stays within " + std::string(range.name) + ", but got " +
                     number(ridge));
  }
}

void check_halves(const Problem& problem) {
  const int64_t tokens = problem.inputs.size(0);
  if (tokens < 2) {
    throw InputError("--ridge: expected at least 2 calibration tokens with auto (one for each half), but got " +
                     std::to_string(tokens));
  }
}

}  // namespace

at::ScalarType compute_type(at::ScalarType weight) { return weight == at::kDouble ? at::kDouble : at::kFloat; }

void check_inputs(const Problem& problem, const Options& options) {
  const Range range = range_of(compute_type(problem.weight.scalar_type()));
  const std::string calibration = where("--inputs", problem.input_origin);
  const at::Tensor squares = sums_of_squares(problem.inputs);
  check_range(calibration, squares, range);
  if (options.ridge_from_data) {
    check_halves(problem);
    if (squares.max().item<double>() == 0.0) {
      throw InputError(calibration + ": expected a value other than 0 for --ridge auto, but all are 0");
    }
  } else {
    check_ridge(squares, options.gptq.ridge, static_cast<double>(problem.inputs.size(0)), range);
  }
  if (problem.fresh_inputs) {
    check_range(where("--fresh-inputs", problem.fresh_input_origin.value_or(TensorOrigin{})),
                sums_of_squares(*problem.fresh_inputs), range);
  }
}

}  // namespace miniquant::driver
