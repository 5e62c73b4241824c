#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

// The results of the operators as the dispatcher passes them; the schemas name the elements.

namespace miniquant::ops {

using QuantizedTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using RidgeTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using SuperblockTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using SuperblockGptqTuple =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using GptqTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

}  // namespace miniquant::ops
