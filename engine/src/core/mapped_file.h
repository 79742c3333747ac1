// A whole file mapped read-only into memory. Owns the mapping; views into it live as long as it
// does.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

#include "framequilt/status.h"

namespace fq {

class MappedFile {
 public:
  static Result<MappedFile> open(const std::filesystem::path& path);
  MappedFile() = default;
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fq
