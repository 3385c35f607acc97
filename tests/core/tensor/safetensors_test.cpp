// Safetensors: what is written reads back; every kind of damage is refused by name; a failed write leaves the old file.
#include "core/tensor/safetensors.h"

#include <sys/resource.h>

#include <csignal>
#include <cstring>
#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "core/base/file.h"

namespace dattn {
namespace {

using testing::HasSubstr;

std::string path_of(const std::string& name) {
  return testing::TempDir() + "/" + testing::UnitTest::GetInstance()->current_test_info()->name() + "_" + name;
}

Tensor counting(DType dtype, const Shape& shape) {
  Tensor values(DType::kF32, shape);
  for (std::int64_t i = 0; i < shape.elements(); ++i) values.ptr<float>()[i] = static_cast<float>(i) - 3.5f;
  return dtype == DType::kF32 ? std::move(values) : to_dtype(values, dtype);
}

// A file from its header's text and a number of data bytes.
std::string file_of(const std::string& header, std::size_t data_bytes) {
  std::string file(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(header.size() >> (8 * i) & 0xff);
  return file + header + std::string(data_bytes, '\1');
}

std::string refusal(const std::string& file) {
  try {
    parse_safetensors(std::as_bytes(std::span(file)), "x.safetensors");
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBadInput);
    return error.what();
  }
  return "no error";
}

TEST(Safetensors, WritesAndReadsBack) {
  const std::string path = path_of("a.safetensors");
  const Tensor a = counting(DType::kF32, {2, 3, 4}), b = counting(DType::kBF16, {5}), c = counting(DType::kF64, {1, 2}),
               half = counting(DType::kF16, {3}), empty(DType::kF32, {0, 3});
  Tensor d(DType::kI32, {3});
  d.ptr<std::int32_t>()[2] = -7;
  const std::vector<NamedTensor> tensors{{"b", b}, {"a", a},       {"empty", empty},           {"c \"quoted\"", c},
                                         {"d", d}, {"half", half}, {"a.T", a->transpose(0, 2)}};
  const std::size_t bytes = write_safetensors(path, tensors, {{"format", "pt"}});
  EXPECT_EQ(bytes, std::filesystem::file_size(path));
  const SafetensorsFile file(path);
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.entries().size(), 7u);
  EXPECT_EQ(file.view("a").shape, a->shape);
  EXPECT_EQ(std::memcmp(file.view("a").data, a->data, 96), 0);
  EXPECT_EQ(std::memcmp(file.view("b").data, b->data, 10), 0);
  EXPECT_EQ(file.view("half").dtype, DType::kF16);
  EXPECT_EQ(std::memcmp(file.view("half").data, half->data, 6), 0);
  EXPECT_EQ(file.view("c \"quoted\"").dtype, DType::kF64);
  EXPECT_EQ(file.view("d").at<std::int32_t>(2), -7);
  EXPECT_EQ(file.view("empty").shape, (Shape{0, 3}));
  const TensorView transposed = file.view("a.T");
  EXPECT_TRUE(transposed.contiguous());
  EXPECT_EQ(transposed.at<float>(3, 1, 1), a->at<float>(1, 1, 3));
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
  file.view("a").at<float>(0, 0, 0) = 99;  // views are private to the process
  EXPECT_EQ(SafetensorsFile(path).view("a").at<float>(0, 0, 0), -3.5f);
  std::filesystem::remove(path);
}

struct Damage {
  std::string file;
  const char* message;
};

class Damaged : public testing::TestWithParam<Damage> {};

TEST_P(Damaged, IsRefusedByName) { EXPECT_THAT(refusal(GetParam().file), HasSubstr(GetParam().message)); }

INSTANTIATE_TEST_SUITE_P(
    Safetensors, Damaged,
    testing::Values(
        Damage{"abc", "x.safetensors: 3 bytes"}, Damage{std::string(8, '\xff'), "a header of 18446744073709551615 bytes"},
        Damage{file_of("{}", 0).substr(0, 9), "truncated: the header has 2 bytes but only 1 follow"},
        Damage{file_of("{nope}", 0), "damaged header"}, Damage{file_of("[]", 0), "no JSON object"},
        Damage{file_of("{\"a\":\"\xff\"}", 0), "damaged header"}, Damage{file_of(R"({"a":[[[[]]]]})", 0), "nested deeper"},
        Damage{file_of(R"({"a":3})", 0), "tensor 'a': the header must give dtype"},
        Damage{file_of(R"({"a":{"dtype":"F32","shape":[1]}})", 4), "tensor 'a': the header must give"},
        Damage{file_of(R"({"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}})", 4), "unknown dtype 'F33'"},
        Damage{file_of(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4), "an extent is -1"},
        Damage{file_of(R"({"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", 4), "an extent is 1.0"},
        Damage{file_of(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}})", 4), "overflows"},
        Damage{file_of(R"({"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}})", 4),
               "more than any file"},
        Damage{file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4), "need 8 bytes, data_offsets give 4"},
        Damage{file_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4), "data_offsets 4 > 0"},
        Damage{file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 7),
               "ends at byte 8 of the data, which has 7"},
        Damage{file_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8),
               "a hole of 4 bytes between the header and tensor 'a'"},
        Damage{file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                       R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                       8),
               "tensor 'b' begins at byte 4 of the data, inside tensor 'a', which ends at 8"},
        Damage{file_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 6),
               "6 bytes of data, but the tensors end at 4"},
        Damage{file_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                       R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                       4),
               "the key 'a' twice"},
        Damage{file_of(R"({"__metadata__":{"k":1}})", 0), "'k' is no string"},
        Damage{file_of(R"({"__metadata__":1})", 0), "__metadata__"}));

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string path = path_of("a.safetensors");
  const Tensor a = counting(DType::kF32, {3});
  const std::vector<NamedTensor> tensors{{"a", a}};
  write_safetensors(path, tensors);
  const std::string whole = read_file(path, "test");
  EXPECT_EQ(refusal(whole), "no error");
  for (std::size_t length = 0; length < whole.size(); ++length)
    EXPECT_NE(refusal(whole.substr(0, length)), "no error") << length;
  std::filesystem::remove(path);
}

TEST(Safetensors, UnknownNamesAndTypesSayWhatThereIs) {
  const std::string path = path_of("a.safetensors");
  write_file(
      path,
      file_of(R"({"q":{"dtype":"I16","shape":[2],"data_offsets":[0,4]},"odd":{"dtype":"I8","shape":[1],"data_offsets":[4,5]}})",
              5));
  const SafetensorsFile file(path);
  EXPECT_TRUE(file.has("q"));
  const auto message = [&](const char* name) -> std::string {
    try {
      file.view(name);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_THAT(message("k"), HasSubstr("no tensor 'k'; the file has: q, odd"));
  EXPECT_THAT(message("q"), HasSubstr("tensor 'q' has dtype I16; F32, BF16, F16, F64 and I32 are read"));
  std::filesystem::remove(path);
}

TEST(Safetensors, MissingFileAndFolder) {
  EXPECT_THROW(SafetensorsFile("none.safetensors"), Error);
  EXPECT_THROW(SafetensorsFile{testing::TempDir()}, Error);
}

// A full disk, by a limit on the size of files: the old file stays, nothing half-written is left.
TEST(Safetensors, FullDiskLeavesTheOldFile) {
  const std::string path = path_of("a.safetensors");
  write_file(path, "old");
  const Tensor large(DType::kF32, {1 << 16});
  const std::vector<NamedTensor> tensors{{"large", large}};
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = before;
  small.rlim_cur = 4096;
  setrlimit(RLIMIT_FSIZE, &small);
  ErrorCode code = ErrorCode::kInternal;
  std::string message = "no error";
  try {
    write_safetensors(path, tensors);
  } catch (const Error& error) {
    code = error.code();
    message = error.what();
  }
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(code, ErrorCode::kSystem) << message;
  EXPECT_THAT(message, HasSubstr(path));
  EXPECT_EQ(read_file(path, "test"), "old");
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace dattn
