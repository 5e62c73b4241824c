#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <limits>

#include "driver/error.h"
#include "driver/safetensors.h"
#include "safetensors_bytes.h"
#include "temporary_folder.h"

namespace miniquant::driver {
namespace {

using testing::HasSubstr;

std::string error_of(const std::filesystem::path& path) {
  try {
    const SafetensorsFile file(path);
  } catch (const InputError& error) {
    return error.what();
  }
  return "no error";
}

// Bit patterns of 1, -2 and 0.5 in every dtype.
TEST(Safetensors, ReadsEveryFloatingDtype) {
  const TemporaryFolder folder;
  const std::string header = R"({"f64":{"dtype":"F64","shape":[3],"data_offsets":[0,24]},)"
                             R"("f32":{"dtype":"F32","shape":[3,1],"data_offsets":[24,36]},)"
                             R"("f16":{"dtype":"F16","shape":[1,3],"data_offsets":[36,42]},)"
                             R"("bf16":{"dtype":"BF16","shape":[3],"data_offsets":[42,48]}})";
  const std::string data = bytes_of<uint64_t>({0x3FF0000000000000U, 0xC000000000000000U, 0x3FE0000000000000U}) +
                           bytes_of<uint32_t>({0x3F800000U, 0xC0000000U, 0x3F000000U}) +
                           bytes_of<uint16_t>({0x3C00U, 0xC000U, 0x3800U}) +
                           bytes_of<uint16_t>({0x3F80U, 0xC000U, 0x3F00U});
  const SafetensorsFile file(folder.write("all", safetensors_bytes(header, data)));
  const at::Tensor expected = at::tensor({1.0, -2.0, 0.5}, at::kDouble);
  for (const auto& [name, dtype, shape] :
       std::vector<std::tuple<std::string, at::ScalarType, std::vector<int64_t>>>{{"f64", at::kDouble, {3}},
                                                                                  {"f32", at::kFloat, {3, 1}},
                                                                                  {"f16", at::kHalf, {1, 3}},
                                                                                  {"bf16", at::kBFloat16, {3}}}) {
    const at::Tensor tensor = file.read(name);
    EXPECT_EQ(tensor.scalar_type(), dtype) << name;
    EXPECT_EQ(tensor.sizes(), at::IntArrayRef(shape)) << name;
    EXPECT_TRUE(at::equal(tensor.to(at::kDouble).flatten(), expected)) << name;
  }
}

TEST(Safetensors, OffsetsNeedNotFollowTheOrderOfTheHeader) {
  const TemporaryFolder folder;
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]},)"
      R"("a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"e":{"dtype":"F32","shape":[0,7],"data_offsets":[4,4]}}   )";
  const SafetensorsFile file(folder.write("f", safetensors_bytes(header, bytes_of<float>({1, 2, 3}))));
  EXPECT_EQ(file.entries().size(), 3U);
  EXPECT_EQ(file.read("a").item<float>(), 1.0F);
  EXPECT_TRUE(at::equal(file.read("b"), at::tensor({2.0F, 3.0F})));
  EXPECT_EQ(file.read("e").sizes(), at::IntArrayRef({0, 7}));
}

TEST(Safetensors, ValuesThatAreNotFiniteKeepTheirBits) {
  const TemporaryFolder folder;
  const SafetensorsFile file(
      folder.write("f", one_tensor_file("x", "[2]", {std::numeric_limits<float>::infinity(), -0.0F})));
  const at::Tensor tensor = file.read("x");
  const auto* values = tensor.const_data_ptr<float>();
  EXPECT_EQ(std::bit_cast<uint32_t>(values[0]), 0x7F800000U);
  EXPECT_EQ(std::bit_cast<uint32_t>(values[1]), 0x80000000U);
}

TEST(Safetensors, FindsByNameOrTheOnlyOne) {
  const TemporaryFolder folder;
  const SafetensorsFile one(folder.write("one", one_tensor_file("weight", "[1]", {1})));
  EXPECT_EQ(one.find("").first, "weight");
  EXPECT_EQ(one.find("weight").first, "weight");
  try {
    static_cast<void>(one.find("wight"));
    FAIL() << "expected InputError";
  } catch (const InputError& error) {
    EXPECT_EQ(error.what(), one.path().string() + ": has no tensor 'wight'; it has 'weight'");
  }
}

TEST(Safetensors, NamesAreListedUpToEight) {
  const TemporaryFolder folder;
  std::string header = "{";
  for (int i = 0; i < 11; ++i) {
    header.append(i == 0 ? "\"t" : ",\"t").append(std::to_string(10 + i));
    header.append(R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})");
  }
  const SafetensorsFile file(folder.write("many", safetensors_bytes(header + "}")));
  try {
    static_cast<void>(file.find(""));
    FAIL() << "expected InputError";
  } catch (const InputError& error) {
    EXPECT_EQ(error.what(),
              file.path().string() +
                  ": has more than one tensor, so its name is needed; it has 't10', 't11', 't12', 't13', 't14', 't15', "
                  "'t16', 't17', and 3 more");
  }
}

TEST(Safetensors, AFileWithoutTensorsOrWithOtherDtypes) {
  const TemporaryFolder folder;
  const SafetensorsFile empty(folder.write("empty", safetensors_bytes("{}")));
  EXPECT_THROW(static_cast<void>(empty.find("")), InputError);
  EXPECT_THROW(static_cast<void>(empty.find("x")), InputError);
  const SafetensorsFile bytes(
      folder.write("u8", safetensors_bytes(R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "a")));
  try {
    static_cast<void>(bytes.read("x"));
    FAIL() << "expected InputError";
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), HasSubstr("tensor 'x': expected dtype F64, F32, F16 or BF16, but got U8"));
  }
}

// Quantized checkpoints hold such tensors beside those that are read.
TEST(Safetensors, ATensorThatCannotBeReadLeavesTheOthers) {
  const TemporaryFolder folder;
  const std::string header = R"({"f4":{"dtype":"F4","shape":[2,4],"data_offsets":[0,4]},)"
                             R"("new":{"dtype":"F3","shape":[3],"data_offsets":[4,6]},)"
                             R"("wide":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[6,6]},)"
                             R"("long":{"dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[6,6]},)"
                             R"("x":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[6,6]},)"
                             R"("y":{"dtype":"F32","shape":[1],"data_offsets":[6,10]}})";
  const SafetensorsFile file(folder.write("f", safetensors_bytes(header, "abcdef" + bytes_of<float>({3}))));
  EXPECT_EQ(file.read("y").item<float>(), 3.0F);
  EXPECT_EQ(file.read("x").size(1), std::numeric_limits<int64_t>::max());
  const auto error = [&](const std::string& name) -> std::string {
    try {
      static_cast<void>(file.read(name));
    } catch (const InputError& problem) {
      return problem.what();
    }
    return "no error";
  };
  const std::string path = file.path().string();
  EXPECT_EQ(error("f4"), path + ": tensor 'f4': expected dtype F64, F32, F16 or BF16, but got F4");
  EXPECT_EQ(error("new"), path + ": tensor 'new': expected dtype F64, F32, F16 or BF16, but got 'F3'");
  for (const char* name : {"wide", "long"}) {
    EXPECT_THAT(error(name), HasSubstr("expected a shape whose sizes multiply to less than 2^63")) << name;
  }
}

TEST(Safetensors, ThingsThatAreNotFiles) {
  const TemporaryFolder folder;
  EXPECT_THAT(error_of(folder.path() / "none"), HasSubstr("cannot be opened: No such file or directory"));
  EXPECT_THAT(error_of(folder.path()), HasSubstr("is not a regular file"));
}

// The file is truncated after its header has been checked.
TEST(Safetensors, AFileThatShrinksWhileItIsRead) {
  const TemporaryFolder folder;
  const auto path = folder.write("f", one_tensor_file("x", "[4]", {1, 2, 3, 4}));
  const SafetensorsFile file(path);
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 5);
  try {
    static_cast<void>(file.read("x"));
    FAIL() << "expected InputError";
  } catch (const InputError& error) {
    EXPECT_THAT(error.what(), HasSubstr("ended while it was read: 5 bytes are missing"));
  }
}

struct Malformed {
  std::string what;
  std::string bytes;
  std::string message;
};

// A header with one tensor 'x', followed by `data_bytes` of data.
Malformed one(const std::string& what, const std::string& x, std::size_t data_bytes, const std::string& message) {
  std::string header = R"({"x":)";
  header.append(x).append("}");
  return {what, safetensors_bytes(header, std::string(data_bytes, 'd')), message};
}

Malformed two(const std::string& what, const std::string& a, const std::string& b, std::size_t data_bytes,
              const std::string& message) {
  std::string header = R"({"a":{"dtype":"U8",)";
  header.append(a).append(R"(},"b":{"dtype":"U8",)").append(b).append("}}");
  return {what, safetensors_bytes(header, std::string(data_bytes, 'd')), message};
}

std::vector<Malformed> malformed_files() {
  const std::string good = one_tensor_file("x", "[2]", {1, 2});
  std::vector<Malformed> files = {
      {"empty file", "", "it has 0 bytes, fewer than the 8 of the header's length"},
      {"length cut", good.substr(0, 7), "it has 7 bytes, fewer than the 8 of the header's length"},
      {"length alone", good.substr(0, 8), "but the file has only 0 bytes after its length"},
      {"header cut", good.substr(0, 30), "but the file has only 22 bytes after its length"},
      {"length beyond the file", little_endian(1000) + good.substr(8),
       "the header claims 1000 bytes, but the file has"},
      {"length beyond the limit", little_endian(100'000'001) + good.substr(8),
       "its header claims 100000001 bytes, more than the format's limit of 100000000 bytes"},
      {"length of all ones", little_endian(~uint64_t{0}) + good.substr(8),
       "its header claims 18446744073709551615 bytes"},
      {"length of 0", little_endian(0), "its header does not start with '{'"},
      {"data cut", good.substr(0, good.size() - 1),
       "data_offsets [0,8] reach past the end of the data, which has 7 bytes"},
      {"bytes behind the data", good + "zz", "2 bytes of the data, at the end of the file, belong to no tensor"},
      {"header is a list", safetensors_bytes("[]"), "its header does not start with '{'"},
      {"byte order mark", safetensors_bytes("\xEF\xBB\xBF{}"), "its header does not start with '{'"},
      {"spaces alone", safetensors_bytes("  "), "its header does not start with '{'"},
      {"NUL behind the header", safetensors_bytes(std::string("{}\0garbage", 10)),
       "the header is not valid JSON: its byte 3 is NUL"},
      {"header is not JSON", safetensors_bytes(R"({"x":)"), "the header is not valid JSON: see its byte 6"},
      {"text after the header", safetensors_bytes("{} {}"), "the header is not valid JSON"},
      {"name is not UTF-8", safetensors_bytes("{\"\xFF\":1}"), "the header is not valid JSON"},
      {"a number beyond all", safetensors_bytes(R"({"x":1e999})"),
       "the header is not valid JSON: a number is out of range"},
      {"deep nesting", safetensors_bytes(R"({"x":)" + std::string(100000, '[')),
       "the header nests deeper than the format allows"},
      {"metadata twice", safetensors_bytes(R"({"__metadata__":{},"__metadata__":{}})"),
       "the header has '__metadata__' twice"},
      {"key twice", safetensors_bytes(R"({"x":{"dtype":"F32","dtype":"F32"}})"), "tensor 'x': has 'dtype' twice"},
      {"metadata is a list", safetensors_bytes(R"({"__metadata__":[]})"),
       "expected __metadata__ to be an object, but got []"},
      {"metadata maps to a number", safetensors_bytes(R"({"__metadata__":{"k":1}})"),
       "expected __metadata__ to map to strings, but one value is 1"},
      {"metadata maps to an object", safetensors_bytes(R"({"__metadata__":{"k":{}}})"),
       "expected __metadata__ to map to strings, but one value is {}"},
      one("tensor is a number", "3", 0, "tensor 'x': expected an object with dtype, shape and data_offsets, but got 3"),
      one("no dtype", R"({"shape":[1],"data_offsets":[0,4]})", 4, "tensor 'x': has no 'dtype'"),
      one("no shape", R"({"dtype":"F32","data_offsets":[0,4]})", 4, "tensor 'x': has no 'shape'"),
      one("no offsets", R"({"dtype":"F32","shape":[1]})", 4, "tensor 'x': has no 'data_offsets'"),
      one("dtype is a number", R"({"dtype":32,"shape":[1],"data_offsets":[0,4]})", 4,
          "tensor 'x': expected dtype to be a string, but got 32"),
      one("shape is a number", R"({"dtype":"F32","shape":1,"data_offsets":[0,4]})", 4,
          "tensor 'x': expected shape to be a list, but got 1"),
      one("negative size", R"({"dtype":"F32","shape":[-1],"data_offsets":[0,4]})", 4,
          "tensor 'x': expected shape to hold integers from 0 to 2^64 - 1, but got [-1]"),
      one("size with a fraction", R"({"dtype":"F32","shape":[1.0],"data_offsets":[0,4]})", 4,
          "expected shape to hold integers from 0 to 2^64 - 1, but got [1.0]"),
      one("size is a string", R"({"dtype":"F32","shape":["1"],"data_offsets":[0,4]})", 4,
          "expected shape to hold integers from 0 to 2^64 - 1, but got [\"1\"]"),
      one("product that wraps to 4 bytes", R"({"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]})", 4,
          "tensor 'x': shape [4611686018427387905] has more bits than can be counted"),
      one("product that wraps to 0", R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]})", 0,
          "has more bits than can be counted"),
      one("product before a 0", R"({"dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0]})", 0,
          "has more bits than can be counted"),
      one("size beyond uint64", R"({"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]})", 4,
          "expected shape to hold integers from 0 to 2^64 - 1"),
      one("part of a byte", R"({"dtype":"F4","shape":[3],"data_offsets":[0,2]})", 2,
          "tensor 'x': shape [3] of F4 needs 12 bits, which are no whole bytes"),
      one("one offset", R"({"dtype":"F32","shape":[1],"data_offsets":[0]})", 4,
          "tensor 'x': expected data_offsets to be two integers of at least 0, but got [0]"),
      one("three offsets", R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,4]})", 4, "but got [0,4,4]"),
      one("negative offset", R"({"dtype":"F32","shape":[1],"data_offsets":[-4,0]})", 4, "but got [-4,0]"),
      one("offset beyond uint64", R"({"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551616]})", 4,
          "expected data_offsets to be two integers"),
      one("offsets in the wrong order", R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})", 4,
          "tensor 'x': data_offsets [4,0] end before they begin"),
      one("offsets beyond the data", R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 4,
          "data_offsets [0,8] reach past the end of the data, which has 4 bytes"),
      one("offsets near the end of uint64",
          R"({"dtype":"F32","shape":[1],"data_offsets":[18446744073709551611,18446744073709551615]})", 4,
          "reach past the end of the data"),
      one("shape larger than its bytes", R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})", 8,
          "shape [3] of F32 needs 12 bytes, but data_offsets [0,8] hold 8 bytes"),
      one("shape smaller than its bytes", R"({"dtype":"BF16","shape":[3],"data_offsets":[0,8]})", 8,
          "shape [3] of BF16 needs 6 bytes, but data_offsets [0,8] hold 8 bytes"),
      two("overlap", R"("shape":[4],"data_offsets":[0,4])", R"("shape":[4],"data_offsets":[2,6])", 6,
          "tensors 'a' and 'b' overlap"),
      two("the same bytes", R"("shape":[4],"data_offsets":[0,4])", R"("shape":[4],"data_offsets":[0,4])", 4,
          "tensors 'a' and 'b' overlap"),
      two("one inside the other", R"("shape":[6],"data_offsets":[0,6])", R"("shape":[2],"data_offsets":[2,4])", 6,
          "tensors 'a' and 'b' overlap"),
      two("hole between", R"("shape":[2],"data_offsets":[0,2])", R"("shape":[2],"data_offsets":[3,5])", 5,
          "1 byte of the data, before tensor 'b', belong to no tensor"),
      two("hole at the start", R"("shape":[2],"data_offsets":[1,3])", R"("shape":[2],"data_offsets":[3,5])", 5,
          "1 byte of the data, before tensor 'a', belong to no tensor"),
  };
  return files;
}

TEST(Safetensors, EveryMalformedFileGetsItsOwnError) {
  const TemporaryFolder folder;
  for (const Malformed& file : malformed_files()) {
    const auto path = folder.write("bad.safetensors", file.bytes);
    const std::string message = error_of(path);
    EXPECT_THAT(message, testing::StartsWith(path.string() + ": ")) << file.what;
    EXPECT_THAT(message, HasSubstr(file.message)) << file.what;
    EXPECT_LT(message.size(), path.string().size() + 300) << file.what;
  }
}

// Every prefix of a good file, and every change of a byte in its header, gives an error or a file that reads; never a
// crash.
TEST(Safetensors, NoPrefixAndNoChangedByteBreaksTheReader) {
  const TemporaryFolder folder;
  const std::string good = one_tensor_file("x", "[2,1]", {1, 2});
  for (std::size_t size = 0; size < good.size(); ++size) {
    EXPECT_NE(error_of(folder.write("f", std::string_view(good).substr(0, size))), "no error") << size;
  }
  for (std::size_t position = 0; position + 8 < good.size(); ++position) {
    for (const char byte : {'\0', '0', '9', '"', '{', '}', '[', ']', ',', '-', '\x7F', '\xFF'}) {
      std::string changed = good;
      changed[position] = byte;
      const auto path = folder.write("f", changed);
      try {
        const SafetensorsFile file(path);
        EXPECT_EQ(file.read(file.find("").first).numel(), 2) << position;
      } catch (const InputError& error) {
        EXPECT_THAT(error.what(), testing::StartsWith(path.string() + ": ")) << position;
      }
    }
  }
}

}  // namespace
}  // namespace miniquant::driver
