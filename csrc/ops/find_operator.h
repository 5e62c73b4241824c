#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace miniquant::ops {

/// An operator as a function of C++, by its name with the namespace. Throws if there is none or its signature is
/// another.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace miniquant::ops
