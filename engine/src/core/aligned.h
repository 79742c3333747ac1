// Aligned, uninitialised storage that grows but never shrinks: the workspace type of the runtime.
// Large ones ask for huge pages: kernels walk them in columns, row after row, and with pages of 4
// KiB every row of a wide matrix is a page of its own. Owned by whoever holds it; not thread-safe.
#pragma once

#include <cstddef>
#include <memory>

namespace fq {

inline constexpr size_t kAlignment = 64;

// `bytes` of uninitialised memory, aligned to kAlignment at least. Throws std::bad_alloc.
void* allocate_aligned(size_t bytes);
void free_aligned(void* memory, size_t bytes);  // `bytes` as allocated

template <class T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t count) { reserve(count); }

  // Makes room for `count` elements. Contents are lost when it has to grow.
  void reserve(size_t count) {
    if (count <= capacity_) return;
    data_.reset();  // old and new need not exist together
    capacity_ = 0;
    data_ = {static_cast<T*>(allocate_aligned(count * sizeof(T))), Free{count * sizeof(T)}};
    capacity_ = count;
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](size_t i) { return data_.get()[i]; }
  const T& operator[](size_t i) const { return data_.get()[i]; }
  size_t capacity() const { return capacity_; }

 private:
  struct Free {
    size_t bytes = 0;
    void operator()(T* p) const { free_aligned(p, bytes); }
  };
  std::unique_ptr<T[], Free> data_;
  size_t capacity_ = 0;
};

}  // namespace fq
