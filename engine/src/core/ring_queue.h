// A queue in a ring of slots that grows and never shrinks: pushing and popping allocate nothing
// once the longest line that ever stood in it has stood. Owns its elements; not thread-safe.
#pragma once

#include <cassert>
#include <cstddef>
#include <utility>
#include <vector>

namespace fq {

template <class T>
class RingQueue {
 public:
  explicit RingQueue(size_t slots = 0) : slots_(slots) {}

  bool empty() const { return size_ == 0; }
  size_t size() const { return size_; }

  void push(T value) {
    if (size_ == slots_.size()) grow();
    slots_[(first_ + size_) % slots_.size()] = std::move(value);
    ++size_;
  }
  T pop() {
    assert(size_ > 0);
    T value = std::exchange(slots_[first_], T());
    first_ = (first_ + 1) % slots_.size();
    --size_;
    return value;
  }

 private:
  void grow() {
    std::vector<T> larger(slots_.empty() ? 4 : 2 * slots_.size());
    for (size_t i = 0; i < size_; ++i) larger[i] = std::move(slots_[(first_ + i) % slots_.size()]);
    slots_ = std::move(larger);
    first_ = 0;
  }

  std::vector<T> slots_;
  size_t first_ = 0, size_ = 0;
};

}  // namespace fq
