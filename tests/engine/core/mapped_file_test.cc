// Mapping whole files: contents, ownership, and what cannot be mapped.
#include "src/core/mapped_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <string>
#include <utility>

#include "tests/engine/testing/temp_dir.h"

namespace fq {
namespace {

std::string text_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

TEST(MappedFile, ShowsTheFileByteForByte) {
  const testing::TempDir directory;
  const std::string content = std::string("a\0b", 3) + std::string(10000, 'x');
  testing::write_file(directory / "f", content);
  const auto file = MappedFile::open(directory / "f");
  ASSERT_TRUE(file) << file.error().to_string();
  EXPECT_EQ(text_of(*file), content);
}

TEST(MappedFile, AnEmptyFileIsAnEmptySpan) {
  const testing::TempDir directory;
  testing::write_file(directory / "f", "");
  const auto file = MappedFile::open(directory / "f");
  ASSERT_TRUE(file) << file.error().to_string();
  EXPECT_TRUE(file->bytes().empty());
}

TEST(MappedFile, MovesKeepTheAddressAndTheOldMappingGoes) {
  const testing::TempDir directory;
  testing::write_file(directory / "a", "first");
  testing::write_file(directory / "b", "second");
  auto a = MappedFile::open(directory / "a");
  auto b = MappedFile::open(directory / "b");
  ASSERT_TRUE(a && b);
  const std::byte* address = b->bytes().data();
  MappedFile target = std::move(*a);
  EXPECT_EQ(text_of(target), "first");
  target = std::move(*b);
  EXPECT_EQ(target.bytes().data(), address);
  EXPECT_EQ(text_of(target), "second");
}

TEST(MappedFile, OutlivesTheFilesName) {
  const testing::TempDir directory;
  testing::write_file(directory / "f", "still here");
  const auto file = MappedFile::open(directory / "f");
  ASSERT_TRUE(file);
  std::filesystem::remove(directory / "f");
  EXPECT_EQ(text_of(*file), "still here");
}

TEST(MappedFile, WhatIsNotThereIsNotFound) {
  const testing::TempDir directory;
  testing::write_file(directory / "f", "x");
  for (const char* name : {"missing", "f/below-a-file"}) {
    const auto file = MappedFile::open(directory / name);
    ASSERT_FALSE(file);
    EXPECT_EQ(file.error().code, Code::kNotFound);
    EXPECT_NE(file.error().message.find(name), std::string::npos);
  }
}

// Files of more than a huge page are placed by hand: all bytes must be there, and nothing else
// mapped.
TEST(MappedFile, MapsLargeFilesWhole) {
  const testing::TempDir directory;
  for (const size_t size : {size_t{2} << 20, (size_t{5} << 20) + 123}) {
    std::string content(size, 0);
    for (size_t i = 0; i < size; ++i) content[i] = static_cast<char>(i * 2654435761u >> 13);
    testing::write_file(directory / "large", content);
    auto file = MappedFile::open(directory / "large");
    ASSERT_TRUE(file) << file.error().to_string();
    ASSERT_EQ(file->bytes().size(), size);
    EXPECT_EQ(std::memcmp(file->bytes().data(), content.data(), size), 0);
    const MappedFile moved = std::move(*file);
    EXPECT_EQ(moved.bytes().back(), static_cast<std::byte>(content.back()));
  }
}

// Opening a FIFO without a writer would block for ever if the open were a blocking one.
TEST(MappedFile, RefusesDirectoriesAndPipes) {
  const testing::TempDir directory;
  ASSERT_EQ(::mkfifo((directory / "pipe").c_str(), 0600), 0);
  for (const auto& path : {directory.path(), directory / "pipe"}) {
    const auto file = MappedFile::open(path);
    ASSERT_FALSE(file);
    EXPECT_EQ(file.error().code, Code::kIo);
  }
}

}  // namespace
}  // namespace fq
