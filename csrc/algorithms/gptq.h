#pragma once

#include <ATen/core/Tensor.h>

#include "algorithms/damping.h"
#include "algorithms/grid.h"
#include "algorithms/sweep.h"
#include "miniquant/options.h"

namespace miniquant::algorithms {

/// What a layer is quantized from, as the stages read it.
struct LayerProblem {
  const ScaledWeight& weight;
  const at::Tensor& hessian;  ///< as miniquant::gptq
  const Damping& damping;
  const at::Tensor& dead;  ///< dead_inputs() of the Hessian
};

/// The sweep, the refinement and the columns of dead inputs: sets the codes of `grid`, and its scales and minima where
/// they are not given. factor: of the Hessian; its memory is free while codes are refined. importance: as sweep_rows()
/// reads it. Returns the loss of each row, in true units.
at::Tensor solve(const LayerProblem& problem, SweepFactor factor, const GptqOptions& options,
                 const at::Tensor& importance, Grid& grid);

/// The fast form. Arguments as miniquant::gptq, already checked.
GptqResult gptq(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options);

/// The textbook form, on any device. Arguments as miniquant::gptq_reference, already checked.
GptqResult gptq_reference(const at::Tensor& weight, const at::Tensor& hessian, const GptqOptions& options);

}  // namespace miniquant::algorithms
