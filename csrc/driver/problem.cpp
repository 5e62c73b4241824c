#include "driver/problem.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/randn.h>

#include <utility>

#include "driver/error.h"
#include "driver/safetensors.h"
#include "driver/sha256.h"

namespace miniquant::driver {
namespace {

constexpr double kWeightScale = 0.02;

std::string shape_text(at::IntArrayRef shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

std::string sha256_of(const at::Tensor& tensor) {
  const at::Tensor contiguous = tensor.contiguous();
  return sha256(contiguous.const_data_ptr(), contiguous.nbytes());
}

TensorOrigin drawn(const at::Tensor& tensor, std::string description) {
  return {.file = "",
          .tensor = "",
          .description = std::move(description),
          .dtype = "F32",
          .shape = tensor.sizes().vec(),
          .sha256 = sha256_of(tensor)};
}

at::Tensor draw_inputs(int64_t columns, int64_t tokens, Distribution distribution, const at::Generator& generator) {
  if (distribution == Distribution::kNormal) return at::randn({columns, tokens}, generator, at::kFloat);
  return at::empty({columns, tokens}, at::kFloat).cauchy_(/*median=*/0.0, /*sigma=*/1.0, generator);
}

struct LoadedTensor {
  at::Tensor data;
  TensorOrigin origin;
  std::string where;  ///< for messages: option, file, tensor
};

LoadedTensor load(const std::string& option, const SafetensorsFile& file, const std::string& name) {
  const auto& [found, entry] = file.find(name);
  LoadedTensor loaded;
  loaded.data = file.read(found);
  loaded.origin = {.file = file.path().filename().string(),
                   .tensor = found,
                   .description = "",
                   .dtype = entry.dtype,
                   .shape = entry.shape,
                   .sha256 = sha256_of(loaded.data)};
  loaded.where = option + ": " + file.path().string() + ": tensor '" + found + "'";
  if (!at::isfinite(loaded.data).all().item<bool>()) {
    const int64_t bad = loaded.data.numel() - at::isfinite(loaded.data).sum().item<int64_t>();
    throw InputError(loaded.where + ": expected finite values, but " + std::to_string(bad) + " of " +
                     std::to_string(loaded.data.numel()) + " are not");
  }
  return loaded;
}

// [..., K] to [tokens, K].
at::Tensor as_tokens(const LoadedTensor& inputs, int64_t columns) {
  const at::IntArrayRef shape = inputs.data.sizes();
  if (shape.empty() || shape.back() != columns) {
    throw InputError(inputs.where + ": expected shape [..., " + std::to_string(columns) +
                     "], the weight's input features last, but got " + shape_text(shape));
  }
  if (inputs.data.numel() == 0) {
    throw InputError(inputs.where + ": expected at least one token, but got shape " + shape_text(shape));
  }
  return inputs.data.reshape({-1, columns});
}

}  // namespace

Problem draw_problem(const SyntheticSource& source, Distribution distribution) {
  const at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(source.seed);
  const bool normal = distribution == Distribution::kNormal;
  const std::string inputs_text = normal ? "randn(K, tokens)" : "empty(K, tokens).cauchy_(0, 1)";

  Problem problem;
  problem.name = name_of(distribution);
  problem.weight = at::randn({source.rows, source.columns}, generator, at::kFloat).mul_(kWeightScale);
  problem.weight_origin = drawn(problem.weight, "randn(N, K) * 0.02, the generator's first numbers");
  const at::Tensor inputs = draw_inputs(source.columns, source.tokens, distribution, generator);
  problem.inputs = inputs.t();
  problem.input_origin = drawn(inputs, inputs_text + ", drawn right after the weight; columns are tokens");
  if (source.fresh_tokens > 0) {
    const at::Tensor fresh = draw_inputs(source.columns, source.fresh_tokens, distribution, generator);
    problem.fresh_inputs = fresh.t();
    problem.fresh_input_origin = drawn(fresh, inputs_text + ", drawn right after the inputs; columns are tokens");
  }
  return problem;
}

Problem load_problem(const FileSource& source) {
  Problem problem;
  problem.name = "file";

  LoadedTensor weight = load("--weights", SafetensorsFile(source.weights), source.tensor);
  if (weight.data.dim() != 2 || weight.data.numel() == 0) {
    throw InputError(weight.where + ": expected a weight [N, K] with N, K >= 1, but got shape " +
                     shape_text(weight.data.sizes()));
  }
  problem.weight = std::move(weight.data);
  problem.weight_origin = std::move(weight.origin);
  const int64_t columns = problem.weight.size(1);

  LoadedTensor inputs = load("--inputs", SafetensorsFile(source.inputs), source.input_tensor);
  problem.inputs = as_tokens(inputs, columns);
  problem.input_origin = std::move(inputs.origin);

  if (!source.fresh_inputs.empty()) {
    const SafetensorsFile file(source.fresh_inputs);
    std::string name = source.fresh_input_tensor;
    if (name.empty() && file.entries().size() != 1) name = problem.input_origin.tensor;
    LoadedTensor fresh = load("--fresh-inputs", file, name);
    problem.fresh_inputs = as_tokens(fresh, columns);
    problem.fresh_input_origin = std::move(fresh.origin);
  }
  return problem;
}

}  // namespace miniquant::driver
