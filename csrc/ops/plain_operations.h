#pragma once

#include <ATen/core/grad_mode.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace miniquant::ops {

/// In its scope ATen's operations record nothing for autograd and compute in the dtype of their arguments: autocast
/// would compute products in bfloat16.
class PlainOperations {
 private:
  at::NoGradGuard no_grad_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

}  // namespace miniquant::ops
