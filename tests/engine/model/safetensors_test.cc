// The safetensors reader against files that this test writes byte by byte.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <ostream>
#include <span>
#include <string>
#include <string_view>

#include "src/model/directory.h"

namespace fq::model {
namespace {

std::string image(uint64_t header_length, std::string_view header, std::string_view data) {
  std::string file(8, 0);
  std::memcpy(file.data(), &header_length, 8);
  file += header;
  file += data;
  return file;
}
std::string image(std::string_view header, std::string_view data) {
  return image(header.size(), header, data);
}

auto parse(const std::string& file) {
  return parse_safetensors(std::as_bytes(std::span(file)), "file");
}

constexpr std::string_view kHeader =
    R"({"__metadata__":{"format":"pt"},)"
    R"("b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]},)"
    R"("a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},)"
    R"("scalar":{"dtype":"U8","shape":[],"data_offsets":[11,12]},)"
    R"("empty":{"dtype":"F32","shape":[4,0],"data_offsets":[12,12]}}   )";
constexpr std::string_view kData = "abcdefghijkl";

TEST(Safetensors, ViewsPointIntoTheFile) {
  const std::string file = image(kHeader, kData);
  const auto tensors = parse(file);
  ASSERT_TRUE(tensors) << tensors.error().to_string();
  ASSERT_EQ(tensors->size(), 4u);
  const TensorView& a = tensors->at("a");
  EXPECT_EQ(a.dtype, DType::kF16);
  EXPECT_EQ(a.shape, (std::vector<int64_t>{2, 2}));
  EXPECT_EQ(a.elements(), 4);
  EXPECT_EQ(reinterpret_cast<const char*>(a.bytes.data()), file.data() + 8 + kHeader.size());
  const TensorView& b = tensors->at("b");
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(b.bytes.data()), b.bytes.size()), "ijk");
  EXPECT_EQ(tensors->at("scalar").elements(), 1);
  EXPECT_EQ(tensors->at("empty").elements(), 0);
}

TEST(Safetensors, AcceptsEveryDTypeOfTheEngineAndNoOther) {
  for (const DType dtype :
       {DType::kF32, DType::kF16, DType::kBF16, DType::kU8, DType::kI8, DType::kI32, DType::kI64}) {
    const std::string size = std::to_string(dtype_bytes(dtype));
    const std::string header = R"({"x":{"dtype":")" + std::string(dtype_name(dtype)) +
                               R"(","shape":[1],"data_offsets":[0,)" + size + "]}}";
    const auto tensors = parse(image(header, std::string(dtype_bytes(dtype), 0)));
    ASSERT_TRUE(tensors) << tensors.error().to_string();
    EXPECT_EQ(tensors->at("x").dtype, dtype);
  }
  for (const char* name : {"F64", "BOOL", "F8_E4M3", "u8", ""}) {
    const std::string header =
        R"({"x":{"dtype":")" + std::string(name) + R"(","shape":[1],"data_offsets":[0,1]}})";
    const auto tensors = parse(image(header, "x"));
    ASSERT_FALSE(tensors) << name;
    EXPECT_NE(tensors.error().message.find("dtype: expected one of"), std::string::npos);
  }
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string file = image(kHeader, kData);
  for (size_t length = 0; length < file.size(); ++length) {
    const auto tensors = parse(file.substr(0, length));
    ASSERT_FALSE(tensors) << length;
    EXPECT_EQ(tensors.error().code, Code::kCorruptModel);
  }
  EXPECT_FALSE(parse(file + "x"));
}

TEST(Safetensors, HostileHeaderLengthsAreRefused) {
  constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
  for (const uint64_t length :
       {uint64_t{0}, uint64_t{1}, kHeader.size() - 4, kHeader.size() + kData.size() + 1,
        uint64_t{100'000'001}, uint64_t{1} << 32, uint64_t{1} << 63, kMax - 7, kMax}) {
    const auto tensors = parse(image(length, kHeader, kData));
    ASSERT_FALSE(tensors) << length;
    EXPECT_EQ(tensors.error().code, Code::kCorruptModel);
  }
}

struct BadHeader {
  const char* what;
  const char* header;  // over 8 bytes of data
  const char* message;
};

// Names a case by its name, not by the bytes of its pointers.
void PrintTo(const BadHeader& value, std::ostream* out) { *out << value.what; }

class RefusedHeader : public ::testing::TestWithParam<BadHeader> {};

TEST_P(RefusedHeader, IsCorrupt) {
  const auto tensors = parse(image(GetParam().header, "01234567"));
  ASSERT_FALSE(tensors);
  EXPECT_EQ(tensors.error().code, Code::kCorruptModel);
  EXPECT_NE(tensors.error().message.find(GetParam().message), std::string::npos)
      << tensors.error().message;
}

INSTANTIATE_TEST_SUITE_P(
    Safetensors, RefusedHeader,
    ::testing::Values(
        BadHeader{"NoTensors", "{}", "tensors cover 0 bytes of data, the file has 8"},
        BadHeader{"LeadingSpace", R"( {"x":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})",
                  "does not start with '{'"},
        BadHeader{"Array", "[]", "does not start with '{'"},
        BadHeader{"NotJson", "{\"x\":", "not valid JSON"},
        BadHeader{"Duplicate",
                  R"({"x":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},)"
                  R"("x":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})",
                  "duplicate key \"x\""},
        BadHeader{"UnknownKey", R"({"x":{"dtype":"U8","shape":[8],"data_offsets":[0,8],"k":1}})",
                  "unknown key \"k\""},
        BadHeader{"MissingKey", R"({"x":{"dtype":"U8","data_offsets":[0,8]}})", "shape: missing"},
        BadHeader{"NotAnObject", R"({"x":[0,8]})", "tensor \"x\": expected an object"},
        BadHeader{"Outside", R"({"x":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}})",
                  "leave the 8 bytes of data"},
        BadHeader{"FarOutside",
                  R"({"x":{"dtype":"U8","shape":[8],)"
                  R"("data_offsets":[18446744073709551608,18446744073709551615]}})",
                  "leave the 8 bytes of data"},
        BadHeader{"Backwards", R"({"x":{"dtype":"U8","shape":[8],"data_offsets":[8,0]}})",
                  "leave the 8 bytes of data"},
        BadHeader{"NegativeOffset", R"({"x":{"dtype":"U8","shape":[8],"data_offsets":[-8,0]}})",
                  "data_offsets: expected two integers"},
        BadHeader{"OneOffset", R"({"x":{"dtype":"U8","shape":[8],"data_offsets":[8]}})",
                  "data_offsets: expected two integers"},
        BadHeader{"ThreeOffsets", R"({"x":{"dtype":"U8","shape":[8],"data_offsets":[0,8,8]}})",
                  "data_offsets: expected an array of at most 2"},
        BadHeader{"Overlap",
                  R"({"x":{"dtype":"U8","shape":[6],"data_offsets":[0,6]},)"
                  R"("y":{"dtype":"U8","shape":[6],"data_offsets":[2,8]}})",
                  "starts at byte 2 of the data, expected 6 (overlap)"},
        BadHeader{"Same",
                  R"({"x":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},)"
                  R"("y":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})",
                  "(overlap)"},
        BadHeader{"Gap",
                  R"({"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                  R"("y":{"dtype":"U8","shape":[2],"data_offsets":[6,8]}})",
                  "starts at byte 6 of the data, expected 2 (gap)"},
        BadHeader{"GapAtTheStart", R"({"x":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
                  "(gap)"},
        BadHeader{"GapAtTheEnd", R"({"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
                  "tensors cover 4 bytes of data, the file has 8"},
        BadHeader{"WrongSize", R"({"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})",
                  "need 12 bytes, data offsets span 8"},
        BadHeader{"NegativeDim", R"({"x":{"dtype":"U8","shape":[-8],"data_offsets":[0,8]}})",
                  "shape: expected integers in [0, 2^53], got -8"},
        BadHeader{"FloatDim", R"({"x":{"dtype":"U8","shape":[8.0],"data_offsets":[0,8]}})",
                  "shape: expected integers"},
        // 2^32 * 2^32 * 8 is 8 modulo 2^64.
        BadHeader{"OverflowingShape",
                  R"({"x":{"dtype":"U8","shape":[4294967296,4294967297,8],"data_offsets":[0,8]}})",
                  "need too many bytes"},
        BadHeader{"OverflowHiddenByAZero",
                  R"({"x":{"dtype":"U8","shape":[9007199254740992,9007199254740992,0],)"
                  R"("data_offsets":[0,0]},"y":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})",
                  "need too many bytes"},
        BadHeader{"ManyDims",
                  R"({"x":{"dtype":"U8","shape":[8,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],)"
                  R"("data_offsets":[0,8]}})",
                  "shape: expected an array of at most 16"},
        BadHeader{"MetadataType",
                  R"({"__metadata__":3,"x":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})",
                  "__metadata__: expected an object, got 3"},
        BadHeader{"MetadataValue",
                  R"({"__metadata__":{"n":3},"x":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})",
                  "__metadata__: \"n\" is not a string"},
        BadHeader{"Deep", R"({"x":{"dtype":[[[["U8"]]]]}})", "nested deeper than 4 levels"}),
    [](const auto& info) { return info.param.what; });

TEST(Safetensors, ADeepHeaderOfMegabytesDoesNotOverflowTheStack) {
  EXPECT_FALSE(parse(image("{\"x\":" + std::string(5'000'000, '['), "")));
}

}  // namespace
}  // namespace fq::model
