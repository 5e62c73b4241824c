// Uses the library through its installed headers and prints the checksum of the codes.

#include <miniquant/miniquant.h>

#include <cstdio>

#include "problem.h"

int main() {
  const at::Tensor weight = problem_weight();
  const at::Tensor hessian = problem_hessian();

  miniquant::GptqOptions options;
  options.group_size = 32;
  const miniquant::GptqResult result = miniquant::gptq(weight, hessian, options);
  std::printf("codes_checksum %lld\n", static_cast<long long>(codes_checksum(result.codes)));

  // Every header is linked against, not only parsed.
  const at::Tensor dequantized =
      miniquant::dequantize(result.codes, result.scales, result.zero_points, options.group_size);
  const double loss = miniquant::quantization_loss(weight, dequantized, hessian).sum().item<double>();
  const miniquant::QuantizedWeight nearest = miniquant::rtn(weight, options);
  const double loss_rtn =
      miniquant::quantization_loss(
          weight, miniquant::dequantize(nearest.codes, nearest.scales, nearest.zero_points, options.group_size),
          hessian)
          .sum()
          .item<double>();
  const bool packs = miniquant::unpack_int4(miniquant::pack_int4(result.codes), kColumns).equal(result.codes);
  miniquant::HessianAccumulator accumulator(kColumns);
  accumulator.update(weight);
  const bool counts = accumulator.tokens() == kRows;
  const bool textbook = miniquant::gptq_reference(weight, hessian, options).codes.equal(result.codes);
  std::printf("loss %.6g loss_rtn %.6g packs %d counts %d textbook %d\n", loss, loss_rtn, packs, counts, textbook);
  return loss < loss_rtn && packs && counts && textbook ? 0 : 1;
}
