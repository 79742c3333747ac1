// Memory-mapped files on POSIX. The mapping outlives the descriptor, which is closed at once.
#include "src/core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

namespace fq {
namespace {

Error system_error(const std::filesystem::path& path, const char* action, int error) {
  Error result;
  result.code = error == ENOENT || error == ENOTDIR ? Code::kNotFound
                : error == ENOMEM                   ? Code::kOutOfMemory
                                                    : Code::kIo;
  result.message = "cannot " + std::string(action) + " '" + path.string() +
                   "': " + std::generic_category().message(error);
  return result;
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

Result<MappedFile> MappedFile::open(const std::filesystem::path& path) {
  // O_NONBLOCK: a FIFO under this name must not block us before fstat can refuse it.
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) return system_error(path, "open", errno);
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) return system_error(path, "read", errno);
  if (!S_ISREG(info.st_mode)) {
    return Error{Code::kIo, "'" + path.string() + "' is not a regular file", ""};
  }
  MappedFile mapped;
  if (info.st_size == 0) return mapped;  // mmap refuses an empty range
  const auto size = static_cast<size_t>(info.st_size);
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (data == MAP_FAILED) return system_error(path, "map", errno);
  mapped.data_ = static_cast<const std::byte*>(data);
  mapped.size_ = size;
  return mapped;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

}  // namespace fq
