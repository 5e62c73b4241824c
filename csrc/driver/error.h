#pragma once

#include <stdexcept>

namespace miniquant::driver {

/// An option, a file or a tensor from the user that cannot be used. The program ends with exit code 2.
class InputError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace miniquant::driver
