#pragma once

#include <ATen/core/Tensor.h>

#include "algorithms/damping.h"

namespace miniquant::algorithms {

/// e H e^T per row, float64 [N]. error: float64 [N, K], contiguous. triangle: H [K, K] in float64, as lower_triangle()
/// lays it out.
at::Tensor quadratic_forms(const at::Tensor& error, const at::Tensor& triangle);

/// The loss with one Hessian, which is converted once and serves several weights.
class LossMeasure {
 public:
  /// hessian: [K, K], as miniquant::quantization_loss, already checked.
  explicit LossMeasure(const at::Tensor& hessian);

  /// e H e^T per row, float64 [N], with the precision of the weight's compute dtype and the range of float64.
  [[nodiscard]] at::Tensor operator()(const at::Tensor& weight, const at::Tensor& dequantized) const;

 private:
  Damping damping_;
  at::Tensor triangle_;
};

/// e H e^T per row. Arguments as miniquant::quantization_loss, already checked.
at::Tensor quantization_loss(const at::Tensor& weight, const at::Tensor& dequantized, const at::Tensor& hessian);

}  // namespace miniquant::algorithms
