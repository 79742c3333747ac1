#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "framequilt/tokenizer.h"
#include "tests/engine/testing/temp_dir.h"
#include "tests/engine/text/tiny_tokenizers.h"

namespace fq {
namespace {

using fq::testing::TempDir;
using fq::testing::write_file;
using nlohmann::json;

std::string config(const std::string& kind, const std::string& file) {
  return json{{"tokens", {{"tokenizer", {{"kind", kind}, {"file", file}}}}}}.dump();
}

Code error_code(const std::filesystem::path& directory) {
  const auto result = Tokenizer::open(directory);
  return result ? Code::kInternal : result.error().code;
}

TEST(OpenTokenizer, ReadsTheFileThatTheConfigNames) {
  const TempDir directory;
  write_file(directory / "config.json", config("huggingface", "tokenizer.json"));
  write_file(directory / "tokenizer.json", fq::testing::tiny_byte_level().dump());
  const auto json_tokenizer = Tokenizer::open(directory.path());
  ASSERT_TRUE(json_tokenizer) << json_tokenizer.error().to_string();
  EXPECT_EQ((*json_tokenizer)->encode("abc")->front(), 29);

  write_file(directory / "config.json", config("sentencepiece", "other.model"));
  write_file(directory / "other.model", fq::testing::tiny_sentencepiece());
  const auto pieces = Tokenizer::open(directory.path());
  ASSERT_TRUE(pieces) << pieces.error().to_string();
  EXPECT_EQ((*pieces)->encode("ab")->front(), 7);
}

TEST(OpenTokenizer, MissingFilesAreNotFound) {
  const TempDir directory;
  EXPECT_EQ(error_code(directory / "nowhere"), Code::kNotFound);
  EXPECT_EQ(error_code(directory.path()), Code::kNotFound);
  write_file(directory / "config.json", config("huggingface", "tokenizer.json"));
  EXPECT_EQ(error_code(directory.path()), Code::kNotFound);
}

TEST(OpenTokenizer, ConfigsThatNameNoPlainFileAreCorrupt) {
  const TempDir directory;
  write_file(directory / "config.json", "{");
  EXPECT_EQ(error_code(directory.path()), Code::kCorruptModel);
  write_file(directory / "config.json", "{}");
  EXPECT_EQ(error_code(directory.path()), Code::kCorruptModel);
  for (const std::string& file :
       {std::string("../tokenizer.json"), std::string("/etc/passwd"), std::string("a/b"),
        std::string(""), std::string("."), std::string(".."), std::string("a\0b", 3)}) {
    write_file(directory / "config.json", config("huggingface", file));
    EXPECT_EQ(error_code(directory.path()), Code::kCorruptModel) << file;
  }
  write_file(directory / "config.json", config("tiktoken", "x"));
  EXPECT_EQ(error_code(directory.path()), Code::kUnsupported);
}

TEST(OpenTokenizer, OversizedFilesAreRefusedUnread) {
  const TempDir directory;
  write_file(directory / "config.json", config("huggingface", "tokenizer.json"));
  write_file(directory / "tokenizer.json", "");
  // Sparse: claims a gigabyte, holds nothing.
  std::filesystem::resize_file(directory / "tokenizer.json", uintmax_t{1} << 30);
  EXPECT_EQ(error_code(directory.path()), Code::kCorruptModel);
}

TEST(OpenTokenizer, ADirectoryInPlaceOfAFileIsAnIoError) {
  const TempDir directory;
  write_file(directory / "config.json", config("huggingface", "tokenizer.json"));
  std::filesystem::create_directory(directory / "tokenizer.json");
  EXPECT_EQ(error_code(directory.path()), Code::kIo);
}

}  // namespace
}  // namespace fq
