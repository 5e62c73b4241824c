#include <gtest/gtest.h>
#include <miniquant/miniquant.h>

#include "tensor_testing.h"

namespace miniquant {
namespace {

// The operator accepts every name: it would reject the option if one were wrong.
TEST(Names, AreThoseOfTheOperators) {
  const at::Tensor weight = testing::normal({3, 32}, 1);
  const at::Tensor hessian = testing::hessian_of_inputs(32, 64, 2);
  GptqOptions options;
  options.group_size = 16;
  for (const ScaleMethod method : {ScaleMethod::kAbsmax, ScaleMethod::kMse, ScaleMethod::kHessian}) {
    options.scale_method = method;
    EXPECT_NO_THROW(gptq(weight, hessian, options)) << name_of(method);
  }
  options.scale_method = ScaleMethod::kLoss;
  options.group_scales = GroupScales::kDynamic;
  for (const ColumnOrder order : {ColumnOrder::kNatural, ColumnOrder::kGroup}) {
    options.column_order = order;
    EXPECT_NO_THROW(gptq(weight, hessian, options)) << name_of(order);
  }
  options.scale_method = ScaleMethod::kAbsmax;
  options.group_scales = GroupScales::kStatic;
  options.column_order = ColumnOrder::kActivation;
  EXPECT_NO_THROW(gptq(weight, hessian, options));
}

}  // namespace
}  // namespace miniquant
