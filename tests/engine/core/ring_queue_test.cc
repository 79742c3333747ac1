// The ring queue against std::deque, and what it is for: no allocation in the long run.
#include "src/core/ring_queue.h"

#include <gtest/gtest.h>

#include <deque>
#include <random>
#include <string>

#include "tests/engine/core/allocation_counter.h"

namespace fq {
namespace {

TEST(RingQueue, KeepsTheOrderOfADeque) {
  std::mt19937 random(1);
  RingQueue<std::string> queue(2);
  std::deque<std::string> want;
  for (int i = 0; i < 10000; ++i) {
    if (want.empty() || random() % 9 < 5 - i / 5000) {  // grows, then shrinks
      want.push_back(std::to_string(i));
      queue.push(std::to_string(i));
    } else {
      ASSERT_EQ(queue.pop(), want.front());
      want.pop_front();
    }
    ASSERT_EQ(queue.size(), want.size());
    ASSERT_EQ(queue.empty(), want.empty());
  }
}

TEST(RingQueue, AllocatesNothingOnceItHasGrown) {
  RingQueue<int> queue;
  for (int i = 0; i < 5; ++i) queue.push(i);
  for (int i = 0; i < 5; ++i) queue.pop();
  const int64_t before = testing::allocation_count();
  for (int i = 0; i < 100; ++i) {
    for (int n = 0; n < 5; ++n) queue.push(n);
    for (int n = 0; n < 5; ++n) EXPECT_EQ(queue.pop(), n);
  }
  EXPECT_EQ(testing::allocation_count(), before);
}

}  // namespace
}  // namespace fq
