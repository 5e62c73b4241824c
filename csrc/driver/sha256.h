#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace miniquant::driver {

/// SHA-256 of `size` bytes, as 64 lowercase hexadecimal digits.
[[nodiscard]] std::string sha256(const void* data, std::size_t size);

/// SHA-256 of the bytes of `text`.
[[nodiscard]] std::string sha256(std::string_view text);

}  // namespace miniquant::driver
