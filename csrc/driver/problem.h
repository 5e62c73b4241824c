#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "driver/options.h"

namespace miniquant::driver {

/// The origin of a tensor.
struct TensorOrigin {
  std::string file;         ///< its name without folders; empty for random numbers
  std::string tensor;       ///< its name in the file
  std::string description;  ///< how random numbers were drawn
  std::string dtype;        ///< as stored: F32, BF16, ...
  std::vector<int64_t> shape;
  std::string sha256;  ///< of its bytes, row-major
};

/// One layer, and the inputs that the schemes are compared on.
struct Problem {
  std::string name;                        ///< of the run: normal, cauchy or file
  at::Tensor weight;                       ///< [N, K]
  at::Tensor inputs;                       ///< [n, K]
  std::optional<at::Tensor> fresh_inputs;  ///< [m, K]
  TensorOrigin weight_origin;
  TensorOrigin input_origin;
  std::optional<TensorOrigin> fresh_input_origin;
};

/// W = randn(N, K) * 0.02, then X, then X_fresh, all float32; X and X_fresh are [K, tokens]. All from one generator,
/// with the numbers that torch.manual_seed(seed) gives in this order in Python. X is N(0, 1) or Cauchy(0, 1).
[[nodiscard]] Problem draw_problem(const SyntheticSource& source, Distribution distribution);

/// Reads the layer and its inputs [..., K]; all dimensions but the last are tokens. Throws InputError if a tensor is
/// missing, has the wrong shape or dtype, or holds a value that is not finite.
[[nodiscard]] Problem load_problem(const FileSource& source);

}  // namespace miniquant::driver
