#pragma once

#include <stdexcept>

namespace miniquant::driver {

/// What the user gave cannot be used: an option, a file, a tensor. The program ends with exit code 2.
class InputError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace miniquant::driver
