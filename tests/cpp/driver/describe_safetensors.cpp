// describe_safetensors FILE...: prints for each file, as a line of JSON, what the driver's reader returns: {"error":
// text}, or {"tensors": {name: {"dtype", "shape", and "data" in hexadecimal digits, or "error" if it cannot be read}}}.
// tests/python/test_safetensors.py compares it with the Python package.

#include <cstddef>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "driver/error.h"
#include "driver/safetensors.h"

namespace miniquant::driver {
namespace {

std::string hexadecimal(const at::Tensor& tensor) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  const auto* bytes = static_cast<const unsigned char*>(tensor.const_data_ptr());
  std::string text;
  for (std::size_t i = 0; i < tensor.nbytes(); ++i) {
    text += kDigits[bytes[i] >> 4U];
    text += kDigits[bytes[i] & 0xFU];
  }
  return text;
}

nlohmann::json describe(const std::string& path) {
  nlohmann::json tensors = nlohmann::json::object();
  try {
    const SafetensorsFile file(path);
    for (const auto& [name, entry] : file.entries()) {
      nlohmann::json& tensor = tensors[name] = {{"dtype", entry.dtype}, {"shape", entry.shape}};
      try {
        tensor["data"] = hexadecimal(file.read(name));
      } catch (const InputError& error) {
        tensor["error"] = error.what();
      }
    }
  } catch (const InputError& error) {
    return {{"error", error.what()}};
  }
  return {{"tensors", tensors}};
}

}  // namespace
}  // namespace miniquant::driver

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) std::cout << miniquant::driver::describe(argv[i]).dump() << '\n';
  return 0;
}
