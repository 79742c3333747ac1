// Workspaces: aligned, whole, and large ones on huge pages' boundaries.
#include "src/core/aligned.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <utility>

namespace fq {
namespace {

TEST(AlignedBuffer, IsAlignedAndWritableFromEndToEnd) {
  AlignedBuffer<float> buffer;
  EXPECT_EQ(buffer.capacity(), 0u);
  for (const size_t count : {size_t{1}, size_t{1000}, size_t{1} << 20, (size_t{5} << 20) + 3}) {
    buffer.reserve(count);
    ASSERT_GE(buffer.capacity(), count);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % kAlignment, 0u);
    std::memset(buffer.data(), 1, count * sizeof(float));
  }
  const float* const before = buffer.data();
  buffer.reserve(10);  // never shrinks
  EXPECT_EQ(buffer.data(), before);
}

TEST(AlignedBuffer, MovesWithItsMemory) {
  AlignedBuffer<char> large(size_t{9} << 20);
  char* const at = large.data();
  AlignedBuffer<char> other(10);
  other = std::move(large);
  EXPECT_EQ(other.data(), at);
  other.reserve(size_t{20} << 20);
  EXPECT_EQ(other.capacity(), size_t{20} << 20);
}

#if defined(__linux__)
TEST(AlignedBuffer, LargeOnesBeginWithAHugePage) {
  const AlignedBuffer<char> large(size_t{5} << 20);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(large.data()) % (size_t{2} << 20), 0u);
}
#endif

}  // namespace
}  // namespace fq
