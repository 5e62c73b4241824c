#include <ATen/core/enum_tag.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "ops/build.h"
#include "ops/checks.h"
#include "ops/signature.h"

// The operators' schemas. include/miniquant/*.h documents them; cpu.cpp and meta.cpp implement them.

TORCH_LIBRARY(miniquant, m) {
  using miniquant::ops::kGridSchema;
  using miniquant::ops::kSweepSchema;
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const char* const results = " -> (Tensor codes, Tensor scales, Tensor zero_points";
  const auto define = [&](const std::string& schema) { m.def(schema.c_str(), tags); };
  define(c10::str("rtn(Tensor weight, *, ", kGridSchema, ")", results, ")"));
  for (const char* op : {"gptq", "gptq_reference"}) {
    define(c10::str(op, "(Tensor weight, Tensor hessian, *, ", kGridSchema, ", ", kSweepSchema, ")", results,
                    ", Tensor row_loss)"));
  }
  const char* const supers = ", Tensor minima, Tensor super_scales, Tensor super_minima";
  define(c10::str("rtn_superblocks(Tensor weight, str kind)", results, supers, ")"));
  define(c10::str("gptq_superblocks(Tensor weight, Tensor hessian, str kind, *, str scale_method=\"absmax\", ",
                  kSweepSchema, ")", results, supers, ", Tensor row_loss)"));
  m.def(
      "hessian_update_(Tensor(a!) hessian, Tensor inputs, *, Tensor? token_weights=None, str precision=\"full\") -> ()",
      tags);
  m.def("product_update_(Tensor(a!) sum, Tensor left, Tensor right) -> ()", tags);
  m.def(
      "accumulator_update_(Tensor(a!) sums, Tensor(b!) tokens, Tensor(c!) weights, Tensor inputs, *, "
      "Tensor? mask=None, Tensor? token_weights=None, str precision=\"full\") -> ()",
      tags);
  m.def(
      "accumulator_merge_(Tensor(a!) sums, Tensor(b!) tokens, Tensor(c!) weights, Tensor other_sums, "
      "Tensor other_tokens, Tensor other_weights) -> ()",
      tags);
  m.def("accumulator_hessian(Tensor sums, Tensor tokens, Tensor weights, *, int? half=None) -> Tensor", tags);
  m.def(
      "accumulator_tokens(Tensor sums, Tensor tokens, Tensor weights, *, int? half=None) -> (Tensor tokens, "
      "Tensor effective_tokens)",
      tags);
  m.def(
      "choose_ridge(Tensor weight, Tensor first, Tensor second, int tokens, *, int bits=4, int group_size=64, "
      "bool symmetric=True) -> (Tensor ridge, Tensor ridges, Tensor losses, Tensor fallbacks)",
      tags);
  m.def("quantization_loss(Tensor weight, Tensor dequantized, Tensor hessian) -> Tensor", tags);
  m.def(
      "dequantize(Tensor codes, Tensor scales, Tensor zero_points, int group_size, *, "
      "ScalarType? dtype=None) -> Tensor",
      tags);
  m.def("pack(Tensor codes, int bits) -> Tensor", tags);
  m.def("unpack(Tensor packed, int bits, SymInt columns) -> Tensor", tags);
  m.def("pack_int4(Tensor codes) -> Tensor", tags);
  m.def("unpack_int4(Tensor packed, SymInt columns) -> Tensor", tags);
  // No tensor among the arguments: one implementation serves every dispatch key.
  m.def("version() -> str", [] { return std::string(miniquant::ops::version()); });
  m.def("instruction_set() -> str", [] { return std::string(miniquant::ops::instruction_set()); });
  m.def("superblock_grid(str kind) -> (int bits, int group_size, bool symmetric)", miniquant::ops::superblock_grid);
  m.def("bfloat16_unit() -> str", [] { return std::string(miniquant::ops::bfloat16_unit()); });
}

// The operators have no derivatives: results never require a gradient, whatever the inputs.
TORCH_LIBRARY_IMPL(miniquant, Autograd, m) {
  for (const char* op :
       {"rtn", "gptq", "gptq_reference", "rtn_superblocks", "gptq_superblocks", "choose_ridge", "hessian_update_",
        "product_update_", "accumulator_update_", "accumulator_merge_", "accumulator_hessian", "accumulator_tokens",
        "quantization_loss", "dequantize", "pack", "unpack", "pack_int4", "unpack_int4"}) {
    m.impl(op, torch::CppFunction::makeFallthrough());
  }
}
