#include "driver/safetensors.h"

#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>

#include "driver/error.h"

namespace miniquant::driver {
namespace {

using nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
// Alignment of the data in a written file, as in the reference.
constexpr std::size_t kAlignment = 8;
// The format's own limit.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
// Max nesting of objects and lists: the limit of the reference's parser, which keys that are not read can reach, too.
constexpr int kMaxDepth = 127;
constexpr std::size_t kMaxQuoted = 60;

struct ItemType {
  std::string_view name;
  uint64_t bits;
  std::optional<at::ScalarType> scalar_type;  ///< if read() supports it
};

constexpr std::array kItemTypes = {ItemType{"F64", 64, at::kDouble},     ItemType{"F32", 32, at::kFloat},
                                   ItemType{"F16", 16, at::kHalf},       ItemType{"BF16", 16, at::kBFloat16},
                                   ItemType{"I64", 64, std::nullopt},    ItemType{"I32", 32, std::nullopt},
                                   ItemType{"I16", 16, std::nullopt},    ItemType{"I8", 8, std::nullopt},
                                   ItemType{"U64", 64, std::nullopt},    ItemType{"U32", 32, std::nullopt},
                                   ItemType{"U16", 16, std::nullopt},    ItemType{"U8", 8, std::nullopt},
                                   ItemType{"BOOL", 8, std::nullopt},    ItemType{"C64", 64, std::nullopt},
                                   ItemType{"F8_E4M3", 8, std::nullopt}, ItemType{"F8_E4M3FNUZ", 8, std::nullopt},
                                   ItemType{"F8_E5M2", 8, std::nullopt}, ItemType{"F8_E5M2FNUZ", 8, std::nullopt},
                                   ItemType{"F8_E8M0", 8, std::nullopt}, ItemType{"F6_E2M3", 6, std::nullopt},
                                   ItemType{"F6_E3M2", 6, std::nullopt}, ItemType{"F4", 4, std::nullopt}};

const ItemType* find_item_type(std::string_view name) {
  const auto* found = std::ranges::find_if(kItemTypes, [&](const auto& t) { return t.name == name; });
  return found == kItemTypes.end() ? nullptr : found;
}

std::string_view dtype_name(at::ScalarType dtype) {
  if (dtype == at::kChar) return "I8";
  const auto* found = std::ranges::find_if(kItemTypes, [&](const auto& t) { return t.scalar_type == dtype; });
  TORCH_INTERNAL_ASSERT(found != kItemTypes.end(), "no safetensors dtype for ", dtype);
  return found->name;
}

// 'text', truncated so a message stays readable, without control characters.
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

// An error in the header; the caller adds the path.
class HeaderError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

[[noreturn]] void reject_tensor(const std::string& name, const std::string& message) {
  throw HeaderError("tensor " + in_quotes(name) + ": " + message);
}

constexpr std::array<const char*, 3> kEntryKeys = {"dtype", "shape", "data_offsets"};

// The value of a key of a tensor. The reference also accepts an entry that is a list of the three values, in order.
const json& entry_value(const std::string& name, const json& entry, std::size_t key) {
  if (entry.is_array() && entry.size() == kEntryKeys.size()) return entry[key];
  if (!entry.is_object()) {
    reject_tensor(name, "expected an object with dtype, shape and data_offsets, but got " + abbreviated(entry));
  }
  const auto found = entry.find(kEntryKeys.at(key));
  if (found == entry.end()) reject_tensor(name, "has no '" + std::string(kEntryKeys.at(key)) + "'");
  return *found;
}

std::string parse_dtype(const std::string& name, const json& value) {
  if (value.is_string()) return value.get<std::string>();
  // The reference also accepts {"F32": null}.
  if (value.is_object() && value.size() == 1 && value.begin()->is_null()) return value.begin().key();
  reject_tensor(name, "expected dtype to be a string, but got " + abbreviated(value));
}

std::vector<uint64_t> parse_shape(const std::string& name, const json& value) {
  if (!value.is_array()) reject_tensor(name, "expected shape to be a list, but got " + abbreviated(value));
  std::vector<uint64_t> shape;
  shape.reserve(value.size());
  for (const json& size : value) {
    if (!size.is_number_unsigned()) {
      reject_tensor(name, "expected shape to hold integers from 0 to 2^64 - 1, but got " + abbreviated(value));
    }
    shape.push_back(size.get<uint64_t>());
  }
  return shape;
}

// The number of bits of a tensor; nullopt if it overflows. Sizes are multiplied from the left, as in the reference, so
// no size after a 0 is too large.
std::optional<uint64_t> bits_of(const std::vector<uint64_t>& shape, uint64_t bits_of_item) {
  uint64_t bits = 1;
  for (const uint64_t size : shape) {
    if (__builtin_mul_overflow(bits, size, &bits)) return std::nullopt;
  }
  if (__builtin_mul_overflow(bits, bits_of_item, &bits)) return std::nullopt;
  return bits;
}

// The entry as written; its offsets count from the start of the data.
SafetensorsFile::Entry parse_entry(const std::string& name, const json& value) {
  SafetensorsFile::Entry entry;
  entry.dtype = parse_dtype(name, entry_value(name, value, 0));
  entry.shape = parse_shape(name, entry_value(name, value, 1));
  const json& offsets = entry_value(name, value, 2);
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    reject_tensor(name, "expected data_offsets to be two integers of at least 0, but got " + abbreviated(offsets));
  }
  entry.begin = offsets[0].get<uint64_t>();
  entry.end = offsets[1].get<uint64_t>();
  return entry;
}

// Checks that the entry lies in the data and is as long as its shape and dtype require.
void check_entry(const std::string& name, const SafetensorsFile::Entry& entry, uint64_t data_bytes) {
  const auto offsets = [&] { return "data_offsets " + abbreviated(json({entry.begin, entry.end})); };
  if (entry.begin > entry.end) reject_tensor(name, offsets() + " end before they begin");
  if (entry.end > data_bytes) {
    reject_tensor(name, offsets() + " reach past the end of the data, which has " + bytes(data_bytes));
  }
  // A dtype of a later version of the format: only its place in the file can be checked.
  const ItemType* type = find_item_type(entry.dtype);
  if (type == nullptr) return;
  const auto shape = [&] { return "shape " + abbreviated(json(entry.shape)); };
  const std::optional<uint64_t> bits = bits_of(entry.shape, type->bits);
  if (!bits) reject_tensor(name, shape() + " has more bits than can be counted");
  if (*bits % 8 != 0) {
    reject_tensor(
        name, shape() + " of " + entry.dtype + " needs " + std::to_string(*bits) + " bits, which are no whole bytes");
  }
  if (entry.end - entry.begin != *bits / 8) {
    reject_tensor(name, shape() + " of " + entry.dtype + " needs " + bytes(*bits / 8) + ", but " + offsets() +
                            " hold " + bytes(entry.end - entry.begin));
  }
}

// Reads the parser's events and keeps only entries, so a header takes no more memory than its entries. As in the
// reference, the last of several tensors of one name counts; `__metadata__` twice, or a key of a tensor twice, is an
// error.
class HeaderReader {
 public:
  explicit HeaderReader(std::map<std::string, SafetensorsFile::Entry>& entries) : entries_(entries) {}

  // json::parse() calls it; returns whether to keep `parsed` in the document.
  bool operator()(int depth, json::parse_event_t event, const json& parsed) {
    switch (event) {
      case json::parse_event_t::key:
        return depth == 1 ? begin_entry(parsed) : depth != 2 || in_metadata_ || is_entry_key(parsed);
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        if (depth >= kMaxDepth) throw HeaderError("the header nests deeper than the format allows");
        return true;
      case json::parse_event_t::object_end:
      case json::parse_event_t::array_end:
      case json::parse_event_t::value:
        if (in_metadata_ && depth == 2) check_metadata_value(parsed);
        if (depth != 1) return true;
        end_entry(parsed);
        return false;
    }
    return true;
  }

 private:
  bool begin_entry(const json& key) {
    name_ = key.get<std::string>();
    entry_keys_.fill(false);
    in_metadata_ = name_ == "__metadata__";
    if (in_metadata_ && std::exchange(has_metadata_, true)) throw HeaderError("the header has '__metadata__' twice");
    return true;
  }

  bool is_entry_key(const json& key) {
    const auto* found = std::ranges::find(kEntryKeys, key.get_ref<const std::string&>());
    if (found == kEntryKeys.end()) return false;
    if (std::exchange(entry_keys_.at(static_cast<std::size_t>(found - kEntryKeys.begin())), true)) {
      reject_tensor(name_, "has '" + std::string(*found) + "' twice");
    }
    return true;
  }

  static void check_metadata_value(const json& text) {
    if (!text.is_string()) {
      throw HeaderError("expected __metadata__ to map to strings, but one value is " + abbreviated(text));
    }
  }

  void end_entry(const json& value) {
    if (!in_metadata_) {
      entries_.insert_or_assign(name_, parse_entry(name_, value));
    } else if (!value.is_object() && !value.is_null()) {
      throw HeaderError("expected __metadata__ to be an object, but got " + abbreviated(value));
    }
    in_metadata_ = false;
  }

  std::map<std::string, SafetensorsFile::Entry>& entries_;
  std::string name_;
  std::array<bool, kEntryKeys.size()> entry_keys_{};
  bool in_metadata_ = false;
  bool has_metadata_ = false;
};

// Throws if the text is not a JSON object for a reason that json::parse() does not see: it takes NUL for the end of the
// text, and skips a byte order mark.
void check_text(const std::string& text) {
  const std::size_t start = text.find_first_not_of(" \t\n\r");
  if (start == std::string::npos || text[start] != '{') {
    throw HeaderError("not a safetensors file: its header does not start with '{'");
  }
  if (const std::size_t nul = text.find('\0'); nul != std::string::npos) {
    throw HeaderError("the header is not valid JSON: its byte " + std::to_string(nul + 1) + " is NUL");
  }
}

// Checks that every byte of the data belongs to exactly one tensor, as the format requires.
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
      throw HeaderError(bytes(item->second.begin - position) + " of the data, before tensor " + in_quotes(item->first) +
                        ", belong to no tensor");
    }
    position = item->second.end;
    previous = item;
  }
  if (position != data_bytes) {
    throw HeaderError(bytes(data_bytes - position) + " of the data, at the end of the file, belong to no tensor");
  }
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : path_(path) {
  static_assert(std::endian::native == std::endian::little,
                "the format is little-endian, and data are read as they are");
  // Without O_NONBLOCK, opening a FIFO waits for a writer.
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

  const uint64_t data_start = kLengthBytes + header_bytes;
  const uint64_t data_bytes = file_size - data_start;
  try {
    check_text(text);
    HeaderReader reader(entries_);
    [[maybe_unused]] const json rest = json::parse(text, std::ref(reader));
    for (const auto& [name, entry] : entries_) check_entry(name, entry, data_bytes);
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
  const std::string where = "tensor " + in_quotes(found) + ": ";
  const ItemType* type = find_item_type(entry.dtype);
  if (type == nullptr || !type->scalar_type) {
    fail(where + "expected dtype F64, F32, F16 or BF16, but got " +
         (type == nullptr ? in_quotes(entry.dtype) : entry.dtype));
  }
  // The sizes as int64. at::empty() also counts strides, in which an empty dimension counts as 1.
  std::vector<int64_t> shape;
  int64_t reach = 1;
  for (const uint64_t size : entry.shape) {
    if (size > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) ||
        __builtin_mul_overflow(reach, std::max<int64_t>(static_cast<int64_t>(size), 1), &reach)) {
      fail(where + "expected a shape whose sizes multiply to less than 2^63, 0 counted as 1, but got " +
           abbreviated(json(entry.shape)));
    }
    shape.push_back(static_cast<int64_t>(size));
  }
  at::Tensor tensor = at::empty(shape, *type->scalar_type);
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

std::string safetensors_text(const std::vector<NamedTensor>& tensors,
                             const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header;
  header["__metadata__"] = metadata;
  std::string data;
  for (const int64_t item_size : {8, 4, 2, 1}) {
    for (const auto& [name, tensor] : tensors) {
      if (tensor.element_size() != item_size) continue;
      const at::Tensor contiguous = tensor.contiguous();
      const std::size_t begin = data.size();
      data.append(static_cast<const char*>(contiguous.const_data_ptr()), contiguous.nbytes());
      header[name] = {{"dtype", dtype_name(contiguous.scalar_type())},
                      {"shape", contiguous.sizes().vec()},
                      {"data_offsets", {begin, data.size()}}};
    }
  }
  std::string text = header.dump(-1, ' ', /*ensure_ascii=*/false, json::error_handler_t::replace);
  text.resize((text.size() + kAlignment - 1) / kAlignment * kAlignment, ' ');
  const uint64_t length = text.size();
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  return file.append(text).append(data);
}

}  // namespace miniquant::driver
