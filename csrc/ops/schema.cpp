#include <ATen/core/enum_tag.h>
#include <torch/library.h>

#include <string>

#include "ops/build.h"

// The operators' signatures. include/miniquant/*.h documents them; cpu.cpp and meta.cpp implement them.

TORCH_LIBRARY(miniquant, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "rtn(Tensor weight, *, int bits=4, int group_size=64, bool symmetric=True, Tensor? scales=None, "
      "Tensor? zero_points=None, bool full_range=False, str scale_method=\"absmax\") "
      "-> (Tensor codes, Tensor scales, Tensor zero_points)",
      tags);
  m.def(
      "gptq(Tensor weight, Tensor hessian, *, int bits=4, int group_size=64, bool symmetric=True, float ridge=0.01, "
      "int block_size=128, str group_scales=\"static\", str column_order=\"natural\", Tensor? scales=None, "
      "Tensor? zero_points=None, bool full_range=False, str scale_method=\"absmax\", int refine=0, int beam_scales=0) "
      "-> (Tensor codes, Tensor scales, Tensor zero_points, Tensor row_loss)",
      tags);
  m.def(
      "gptq_reference(Tensor weight, Tensor hessian, *, int bits=4, int group_size=64, bool symmetric=True, "
      "float ridge=0.01, int block_size=128, str group_scales=\"static\", str column_order=\"natural\", "
      "Tensor? scales=None, Tensor? zero_points=None, bool full_range=False, str scale_method=\"absmax\", "
      "int refine=0, int beam_scales=0) -> (Tensor codes, Tensor scales, Tensor zero_points, Tensor row_loss)",
      tags);
  m.def("hessian_update_(Tensor(a!) hessian, Tensor inputs) -> ()", tags);
  m.def(
      "choose_ridge(Tensor weight, Tensor first, Tensor second, int tokens, *, int bits=4, int group_size=64, "
      "bool symmetric=True) -> (Tensor ridge, Tensor ridges, Tensor losses)",
      tags);
  m.def("quantization_loss(Tensor weight, Tensor dequantized, Tensor hessian) -> Tensor", tags);
  m.def("dequantize(Tensor codes, Tensor scales, Tensor zero_points, int group_size) -> Tensor", tags);
  m.def("pack_int4(Tensor codes) -> Tensor", tags);
  m.def("unpack_int4(Tensor packed, SymInt columns) -> Tensor", tags);
  // No tensors, so that one implementation serves every dispatch key.
  m.def("version() -> str", [] { return std::string(miniquant::ops::version()); });
  m.def("instruction_set() -> str", [] { return std::string(miniquant::ops::instruction_set()); });
}

// None of the operators has a derivative: results never require a gradient, whatever their inputs do.
TORCH_LIBRARY_IMPL(miniquant, Autograd, m) {
  for (const char* op : {"rtn", "gptq", "gptq_reference", "choose_ridge", "hessian_update_", "quantization_loss",
                         "dequantize", "pack_int4", "unpack_int4"}) {
    m.impl(op, torch::CppFunction::makeFallthrough());
  }
}
