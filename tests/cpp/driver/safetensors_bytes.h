#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace miniquant::driver {

/// `value` as the eight bytes, least significant first, that start a safetensors file.
inline std::string little_endian(uint64_t value) {
  std::string bytes;
  for (unsigned i = 0; i < 8; ++i) bytes += static_cast<char>((value >> (8 * i)) & 0xFFU);
  return bytes;
}

/// A safetensors file: the header's length, the header, and the data.
inline std::string safetensors_bytes(std::string_view header, std::string_view data = "") {
  std::string bytes = little_endian(header.size());
  bytes.append(header).append(data);
  return bytes;
}

/// The bytes of the values, as they lie in memory.
template <typename T>
std::string bytes_of(const std::vector<T>& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

/// A file with one F32 tensor.
inline std::string one_tensor_file(const std::string& name, const std::string& shape,
                                   const std::vector<float>& values) {
  const std::string size = std::to_string(values.size() * sizeof(float));
  std::string header = R"({")";
  header.append(name).append(R"(":{"dtype":"F32","shape":)").append(shape);
  header.append(R"(,"data_offsets":[0,)").append(size).append("]}}");
  return safetensors_bytes(header, bytes_of(values));
}

}  // namespace miniquant::driver
