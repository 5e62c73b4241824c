#include "driver/problem.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/randn.h>

#include <algorithm>
#include <string_view>
#include <utility>

#include "driver/error.h"
#include "driver/safetensors.h"
#include "driver/sha256.h"

namespace miniquant::driver {
namespace {

constexpr double kWeightScale = 0.02;

// [2, 3], truncated so a message stays readable.
std::string shape_text(const std::vector<uint64_t>& shape) {
  constexpr std::size_t kMaxShown = 8;
  std::string text = "[";
  for (std::size_t i = 0; i < std::min(shape.size(), kMaxShown); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  if (shape.size() <= kMaxShown) return text + "]";
  return text + ", ...] of " + std::to_string(shape.size()) + " dimensions";
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

// A tensor in a file; its shape and dtype are known before its data are read.
class StoredTensor {
 public:
  StoredTensor(std::string_view option, const SafetensorsFile& file, const std::string& name)
      : file_(file), item_(file.find(name)) {
    where_.append(option).append(": ").append(file.path().string()).append(": tensor '").append(item_.first + "'");
  }

  [[nodiscard]] const std::vector<uint64_t>& shape() const { return item_.second.shape; }

  [[nodiscard]] bool is_empty() const { return std::ranges::find(shape(), uint64_t{0}) != shape().end(); }

  // Throws InputError that names the option, file and tensor.
  [[noreturn]] void fail(const std::string& message) const { throw InputError(where_ + ": " + message); }

  // The data as [M, columns], M the product of the other dimensions. (Operators of torch take at most 64 dimensions.)
  [[nodiscard]] at::Tensor read(int64_t columns) const {
    at::Tensor data = file_.read(item_.first).view({-1, columns});
    const int64_t finite = at::isfinite(data).sum().item<int64_t>();
    if (finite != data.numel()) {
      fail("expected finite values, but " + std::to_string(data.numel() - finite) + " of " +
           std::to_string(data.numel()) + " are not");
    }
    return data;
  }

  [[nodiscard]] TensorOrigin origin(const at::Tensor& data) const {
    return {.file = file_.path().filename().string(),
            .tensor = item_.first,
            .description = "",
            .dtype = item_.second.dtype,
            .shape = {shape().begin(), shape().end()},
            .sha256 = sha256_of(data)};
  }

 private:
  const SafetensorsFile& file_;
  const std::pair<const std::string, SafetensorsFile::Entry>& item_;
  std::string where_;
};

struct Loaded {
  at::Tensor data;
  TensorOrigin origin;
};

Loaded load_weight(const SafetensorsFile& file, const std::string& name) {
  const StoredTensor stored("--weights", file, name);
  if (stored.shape().size() != 2 || stored.is_empty()) {
    stored.fail("expected a weight [N, K] with N, K >= 1, but got shape " + shape_text(stored.shape()));
  }
  const at::Tensor data = stored.read(static_cast<int64_t>(stored.shape()[1]));
  return {.data = data, .origin = stored.origin(data)};
}

// Inputs [..., K] as [tokens, K].
Loaded load_inputs(std::string_view option, const SafetensorsFile& file, const std::string& name, int64_t columns) {
  const StoredTensor stored(option, file, name);
  if (stored.shape().empty() || std::cmp_not_equal(stored.shape().back(), columns)) {
    stored.fail("expected shape [..., " + std::to_string(columns) + "], the weight's input features last, but got " +
                shape_text(stored.shape()));
  }
  if (stored.is_empty()) stored.fail("expected at least one token, but got shape " + shape_text(stored.shape()));
  const at::Tensor data = stored.read(columns);
  return {.data = data, .origin = stored.origin(data)};
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

  Loaded weight = load_weight(SafetensorsFile(source.weights), source.tensor);
  problem.weight = std::move(weight.data);
  problem.weight_origin = std::move(weight.origin);
  const int64_t columns = problem.weight.size(1);

  Loaded inputs = load_inputs("--inputs", SafetensorsFile(source.inputs), source.input_tensor, columns);
  problem.inputs = std::move(inputs.data);
  problem.input_origin = std::move(inputs.origin);

  if (!source.fresh_inputs.empty()) {
    const SafetensorsFile file(source.fresh_inputs);
    std::string name = source.fresh_input_tensor;
    if (name.empty() && file.entries().size() != 1) name = problem.input_origin.tensor;
    Loaded fresh = load_inputs("--fresh-inputs", file, name, columns);
    problem.fresh_inputs = std::move(fresh.data);
    problem.fresh_input_origin = std::move(fresh.origin);
  }
  return problem;
}

}  // namespace miniquant::driver
