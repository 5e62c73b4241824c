#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace miniquant::driver {

/// A safetensors file: 8 bytes with the header's length n (little-endian), n bytes of JSON, then the bytes of the
/// tensors.
///
/// The constructor reads the header and checks all of it against the size of the file: the length, offsets and shape of
/// every tensor, that none overlap, and that no bytes between or after them are unused. No value of the header is used
/// to allocate or read before that. Tensors are read on demand. Accepts and rejects what the Python package safetensors
/// 0.8 does, with one exception: a tensor of an unknown dtype does not make the others unreadable. Errors are
/// InputError and start with the path.
/// does not make the others unreadable. Errors are InputError and start with the path.
class SafetensorsFile {
 public:
  struct Entry {
    std::string dtype;  ///< as written in the header: F32, BF16, ...
    std::vector<uint64_t> shape;
    uint64_t begin = 0;  ///< of the tensor's bytes, from the start of the file
    uint64_t end = 0;
  };

  explicit SafetensorsFile(const std::filesystem::path& path);
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;
  ~SafetensorsFile();

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

  /// All tensors by name.
  [[nodiscard]] const std::map<std::string, Entry>& entries() const { return entries_; }

  /// The tensor called `name`, or, if `name` is empty, the only tensor of the file. Returns the name and the entry.
  /// InputError if there is no such tensor; the message lists the names in the file.
  [[nodiscard]] const std::pair<const std::string, Entry>& find(const std::string& name) const;

  /// The tensor's data. InputError if its dtype is not F64, F32, F16 or BF16, or torch cannot hold its shape.
  [[nodiscard]] at::Tensor read(const std::string& name) const;

 private:
  [[noreturn]] void fail(const std::string& message) const;
  void parse_header(uint64_t file_size);
  void read_exactly(void* destination, uint64_t size, uint64_t offset) const;

  std::filesystem::path path_;
  int descriptor_ = -1;
  std::map<std::string, Entry> entries_;
};

/// A tensor and its name in a file. Its dtype is float64, float32, float16, bfloat16 or int8.
struct NamedTensor {
  std::string name;
  at::Tensor data;
};

/// The bytes of a safetensors file with these tensors and this `__metadata__`. The widest dtypes come first, so every
/// tensor starts at a multiple of its item size.
[[nodiscard]] std::string safetensors_text(const std::vector<NamedTensor>& tensors,
                                           const std::map<std::string, std::string>& metadata);

}  // namespace miniquant::driver
