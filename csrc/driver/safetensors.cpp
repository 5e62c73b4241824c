#include "driver/safetensors.h"

#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

#include "driver/error.h"

namespace miniquant::driver {
namespace {

using nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
// The limit that the format itself sets.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
// {"name": {"shape": [1]}}: what the format allows nests no deeper.
constexpr int kMaxDepth = 3;
constexpr std::size_t kMaxQuoted = 60;

struct ItemType {
  std::string_view name;
  uint64_t bytes;
  std::optional<at::ScalarType> scalar_type;  ///< where read() supports it
};

constexpr std::array kItemTypes = {
    ItemType{"F64", 8, at::kDouble},      ItemType{"F32", 4, at::kFloat},      ItemType{"F16", 2, at::kHalf},
    ItemType{"BF16", 2, at::kBFloat16},   ItemType{"I64", 8, std::nullopt},    ItemType{"I32", 4, std::nullopt},
    ItemType{"I16", 2, std::nullopt},     ItemType{"I8", 1, std::nullopt},     ItemType{"U64", 8, std::nullopt},
    ItemType{"U32", 4, std::nullopt},     ItemType{"U16", 2, std::nullopt},    ItemType{"U8", 1, std::nullopt},
    ItemType{"BOOL", 1, std::nullopt},    ItemType{"C64", 8, std::nullopt},    ItemType{"F8_E4M3", 1, std::nullopt},
    ItemType{"F8_E5M2", 1, std::nullopt}, ItemType{"F8_E8M0", 1, std::nullopt}};

const ItemType* find_item_type(std::string_view name) {
  const auto* found = std::ranges::find_if(kItemTypes, [&](const auto& t) { return t.name == name; });
  return found == kItemTypes.end() ? nullptr : found;
}

// 'text', cut to a length that leaves a message readable, without control characters.
std::string in_quotes(std::string_view text) {
  std::string result = "'";
  for (const char c : text.substr(0, kMaxQuoted)) result += static_cast<unsigned char>(c) < 0x20 ? '?' : c;
  if (text.size() > kMaxQuoted) result += "...";
  return result + "'";
}

std::string bytes(uint64_t count) { return std::to_string(count) + (count == 1 ? " byte" : " bytes"); }

std::string abbreviated(const json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (text.size() > kMaxQuoted) text = text.substr(0, kMaxQuoted) + "...";
  return text;
}

// What is wrong with the header; the caller adds the path.
class HeaderError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Refuses while parsing what a parsed document no longer shows, or what would be costly to hold.
class HeaderGuard {
 public:
  bool operator()(int depth, json::parse_event_t event, const json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        if (depth >= kMaxDepth) throw HeaderError("the header nests deeper than the format allows");
        if (event == json::parse_event_t::object_start) keys_.at(static_cast<std::size_t>(depth)).clear();
        break;
      case json::parse_event_t::key: {
        // The depth of a key is that of the values in its object, one more than that of the object's start.
        const auto& key = parsed.get_ref<const std::string&>();
        if (!keys_.at(static_cast<std::size_t>(depth - 1)).insert(key).second) {
          throw HeaderError("the header has " + in_quotes(key) + " twice");
        }
        break;
      }
      default:
        break;
    }
    return true;
  }

 private:
  std::array<std::set<std::string>, kMaxDepth> keys_;
};

SafetensorsFile::Entry parse_entry(const std::string& name, const json& value, uint64_t data_bytes) {
  const auto refuse = [&](const std::string& message) -> void {
    throw HeaderError("tensor " + in_quotes(name) + ": " + message);
  };
  if (!value.is_object()) refuse("expected an object, but got " + abbreviated(value));
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!value.contains(key)) refuse("has no '" + std::string(key) + "'");
  }
  if (value.size() != 3) refuse("expected dtype, shape and data_offsets only, but got " + abbreviated(value));

  SafetensorsFile::Entry entry;
  const json& dtype = value["dtype"];
  if (!dtype.is_string()) refuse("expected dtype to be a string, but got " + abbreviated(dtype));
  entry.dtype = dtype.get<std::string>();
  const ItemType* type = find_item_type(entry.dtype);
  if (type == nullptr) refuse("unknown dtype " + in_quotes(entry.dtype));

  const json& shape = value["shape"];
  if (!shape.is_array()) refuse("expected shape to be a list, but got " + abbreviated(shape));
  uint64_t expected_bytes = type->bytes;
  // The largest stride is the product of the sizes with 1 for 0: it must be countable even where no bytes are held.
  int64_t reach = static_cast<int64_t>(type->bytes);
  bool too_large = false;
  for (const json& size : shape) {
    if (!size.is_number_unsigned() ||
        size.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      refuse("expected shape to hold integers from 0 to 2^63 - 1, but got " + abbreviated(shape));
    }
    entry.shape.push_back(size.get<int64_t>());
    too_large = too_large || __builtin_mul_overflow(reach, std::max<int64_t>(entry.shape.back(), 1), &reach);
    expected_bytes *= size.get<uint64_t>();
  }
  if (too_large) refuse("shape " + abbreviated(shape) + " has more bytes than can be counted");

  const json& offsets = value["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    refuse("expected data_offsets to be two integers of at least 0, but got " + abbreviated(offsets));
  }
  entry.begin = offsets[0].get<uint64_t>();
  entry.end = offsets[1].get<uint64_t>();
  if (entry.begin > entry.end) refuse("data_offsets " + abbreviated(offsets) + " end before they begin");
  if (entry.end > data_bytes) {
    refuse("data_offsets " + abbreviated(offsets) + " reach past the end of the data, which has " + bytes(data_bytes));
  }
  if (entry.end - entry.begin != expected_bytes) {
    refuse("shape " + abbreviated(shape) + " of " + entry.dtype + " needs " + bytes(expected_bytes) +
           ", but data_offsets " + abbreviated(offsets) + " hold " + bytes(entry.end - entry.begin));
  }
  return entry;
}

void check_metadata(const json& value) {
  if (!value.is_object()) throw HeaderError("expected __metadata__ to be an object, but got " + abbreviated(value));
  for (const auto& [key, text] : value.items()) {
    if (!text.is_string()) {
      throw HeaderError("expected __metadata__ to map to strings, but " + in_quotes(key) + " is " + abbreviated(text));
    }
  }
}

// The format wants every byte of the data to belong to exactly one tensor.
void check_layout(const std::map<std::string, SafetensorsFile::Entry>& entries, uint64_t data_bytes) {
  using Item = std::pair<const std::string, SafetensorsFile::Entry>;
  std::vector<const Item*> by_offset;
  by_offset.reserve(entries.size());
  for (const Item& item : entries) by_offset.push_back(&item);
  std::ranges::sort(by_offset, [](const Item* a, const Item* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  uint64_t position = 0;
  const Item* previous = nullptr;
  for (const Item* item : by_offset) {
    if (item->second.begin < position) {
      throw HeaderError("tensors " + in_quotes(previous->first) + " and " + in_quotes(item->first) + " overlap");
    }
    if (item->second.begin > position) {
      throw HeaderError("the data have " + bytes(item->second.begin - position) + " before tensor " +
                        in_quotes(item->first) + " that no tensor has");
    }
    position = item->second.end;
    previous = item;
  }
  if (position != data_bytes) {
    throw HeaderError("the data have " + bytes(data_bytes - position) + " at the end of the file that no tensor has");
  }
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : path_(path) {
  static_assert(std::endian::native == std::endian::little,
                "the format is little-endian, and data are read as they are");
  // Opening a FIFO would otherwise wait for a writer.
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor_ < 0) fail("cannot be opened: " + std::generic_category().message(errno));
  try {
    struct stat status{};
    if (::fstat(descriptor_, &status) != 0) fail("cannot be read: " + std::generic_category().message(errno));
    if (!S_ISREG(status.st_mode)) fail("is not a regular file");
    parse_header(static_cast<uint64_t>(status.st_size));
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

SafetensorsFile::~SafetensorsFile() { ::close(descriptor_); }

void SafetensorsFile::fail(const std::string& message) const { throw InputError(path_.string() + ": " + message); }

void SafetensorsFile::parse_header(uint64_t file_size) {
  if (file_size < kLengthBytes) {
    fail("not a safetensors file: it has " + bytes(file_size) + ", fewer than the 8 of the header's length");
  }
  uint64_t header_bytes = 0;
  read_exactly(&header_bytes, sizeof(header_bytes), 0);
  if (header_bytes > kMaxHeaderBytes) {
    fail("not a safetensors file: its header claims " + bytes(header_bytes) + ", more than the format's limit of " +
         bytes(kMaxHeaderBytes));
  }
  if (header_bytes > file_size - kLengthBytes) {
    fail("the header claims " + bytes(header_bytes) + ", but the file has only " + bytes(file_size - kLengthBytes) +
         " after its length");
  }
  std::string text(header_bytes, '\0');
  read_exactly(text.data(), header_bytes, kLengthBytes);
  if (!text.starts_with('{')) fail("not a safetensors file: its header does not start with '{'");

  const uint64_t data_start = kLengthBytes + header_bytes;
  const uint64_t data_bytes = file_size - data_start;
  try {
    const json header = json::parse(text, HeaderGuard());
    for (const auto& [name, value] : header.items()) {
      if (name == "__metadata__") {
        check_metadata(value);
      } else {
        entries_.emplace(name, parse_entry(name, value, data_bytes));
      }
    }
    check_layout(entries_, data_bytes);
  } catch (const HeaderError& error) {
    fail(error.what());
  } catch (const json::parse_error& error) {
    fail("the header is not valid JSON: see its byte " + std::to_string(error.byte));
  } catch (const json::exception&) {
    fail("the header is not valid JSON: a number is out of range");
  }
  for (auto& [name, entry] : entries_) {
    entry.begin += data_start;
    entry.end += data_start;
  }
}

const std::pair<const std::string, SafetensorsFile::Entry>& SafetensorsFile::find(const std::string& name) const {
  if (!name.empty()) {
    if (const auto found = entries_.find(name); found != entries_.end()) return *found;
  } else if (entries_.size() == 1) {
    return *entries_.begin();
  }
  if (entries_.empty()) fail("has no tensors");
  constexpr std::size_t kMaxListed = 8;
  std::string names;
  std::size_t listed = 0;
  for (const auto& [other, entry] : entries_) {
    if (listed == kMaxListed) {
      names += ", and " + std::to_string(entries_.size() - listed) + " more";
      break;
    }
    names += (listed++ == 0 ? "" : ", ") + in_quotes(other);
  }
  fail((name.empty() ? "has more than one tensor, so its name is needed" : "has no tensor " + in_quotes(name)) +
       "; it has " + names);
}

at::Tensor SafetensorsFile::read(const std::string& name) const {
  const auto& [found, entry] = find(name);
  const ItemType* type = find_item_type(entry.dtype);
  if (!type->scalar_type) {
    fail("tensor " + in_quotes(found) + ": expected dtype F64, F32, F16 or BF16, but got " + entry.dtype);
  }
  at::Tensor tensor = at::empty(entry.shape, *type->scalar_type);
  read_exactly(tensor.mutable_data_ptr(), entry.end - entry.begin, entry.begin);
  return tensor;
}

void SafetensorsFile::read_exactly(void* destination, uint64_t size, uint64_t offset) const {
  auto* position = static_cast<char*>(destination);
  while (size > 0) {
    const ssize_t count = ::pread(descriptor_, position, size, static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail("cannot be read: " + std::generic_category().message(errno));
    if (count == 0) fail("ended while it was read: " + bytes(size) + " are missing");
    position += count;
    offset += static_cast<uint64_t>(count);
    size -= static_cast<uint64_t>(count);
  }
}

}  // namespace miniquant::driver
