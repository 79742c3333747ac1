// Parallel loops: every item once, nothing allocated, and results visible to the caller. The tests
// of hand-over are most useful under ThreadSanitizer.
#include "src/core/thread_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "tests/engine/core/allocation_counter.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace fq {
namespace {

class Threads : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(ThreadPool, Threads, ::testing::Values(1, 2, 3, 8));

TEST_P(Threads, RunEveryItemExactlyOnceWithAValidThread) {
  ThreadPool pool(GetParam());
  ASSERT_EQ(pool.threads(), GetParam());
  for (const int64_t items : {0, 1, 2, 3, 7, 64, 1000}) {
    std::vector<std::atomic<int>> runs(static_cast<size_t>(items));
    std::atomic<bool> valid{true};
    pool.parallel_for(items, [&](int64_t item, int thread) {
      if (item < 0 || item >= items || thread < 0 || thread >= pool.threads()) valid = false;
      runs[static_cast<size_t>(item)].fetch_add(1);
    });
    EXPECT_TRUE(valid);
    for (const auto& count : runs) EXPECT_EQ(count.load(), 1);
  }
}

TEST_P(Threads, RunEveryItemOfStreamsExactlyOnce) {
  ThreadPool pool(GetParam());
  for (const int64_t items : {0, 1, 2, 3, 7, 64, 1000}) {
    for (int repeat = 0; repeat < 50; ++repeat) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(items));
      std::atomic<bool> valid{true};
      pool.parallel_streams(
          items,
          [&](int64_t item, int thread) {
            if (item < 0 || item >= items || thread < 0 || thread >= pool.threads()) valid = false;
            runs[static_cast<size_t>(item)].fetch_add(1);
          },
          {.short_items = repeat % 2 == 1});
      EXPECT_TRUE(valid);
      for (const auto& count : runs) EXPECT_EQ(count.load(), 1);
      // The other kind of loop right after it.
      std::atomic<int64_t> sum{0};
      pool.parallel_for(items, [&](int64_t item, int) { sum.fetch_add(item); });
      EXPECT_EQ(sum.load(), items * (items - 1) / 2);
    }
  }
}

// Plain, unsynchronised memory: each loop reads what another thread wrote in the loop before.
TEST_P(Threads, SeeWhatTheLoopBeforeWrote) {
  ThreadPool pool(GetParam());
  constexpr int64_t kItems = 37;
  std::vector<int64_t> values(kItems, 0), next(kItems, 0);
  constexpr int kLoops = 3000;
  for (int loop = 0; loop < kLoops; ++loop) {
    pool.parallel_for(kItems, [&](int64_t item, int) {
      next[static_cast<size_t>(item)] = values[static_cast<size_t>((item + 1) % kItems)] + 1;
    });
    values.swap(next);
  }
  for (const int64_t value : values) EXPECT_EQ(value, kLoops);
}

// A thread index belongs to one thread during a loop: per-thread scratch memory needs no lock.
TEST_P(Threads, GiveEachThreadItsOwnScratch) {
  ThreadPool pool(GetParam());
  std::vector<int64_t> scratch(static_cast<size_t>(pool.threads()) * 16, 0);
  int64_t items = 0;
  for (int loop = 0; loop < 500; ++loop) {
    pool.parallel_for(loop % 20, [&](int64_t, int thread) { ++scratch[size_t(thread) * 16]; });
    items += loop % 20;
  }
  EXPECT_EQ(std::accumulate(scratch.begin(), scratch.end(), int64_t{0}), items);
}

TEST_P(Threads, AllocateNothingInALoop) {
  ThreadPool pool(GetParam());
  std::atomic<int64_t> sum{0};
  const auto body = [&](int64_t item, int) { sum.fetch_add(item); };
  pool.parallel_for(100, body);
  // Several tries: a worker that starts up late may allocate in the middle of one.
  int64_t fewest = INT64_MAX;
  for (int attempt = 0; attempt < 10 && fewest != 0; ++attempt) {
    const int64_t before = testing::allocation_count();
    for (int loop = 0; loop < 100; ++loop) pool.parallel_for(100, body);
    fewest = std::min(fewest, testing::allocation_count() - before);
  }
  EXPECT_EQ(fewest, 0);
}

// One item holds its thread until all others ran: that ends only if a second thread takes items
// while the first is busy, whichever thread got the held item.
TEST(ThreadPool, WorkersTakeItemsWhileTheCallerIsBusy) {
  ThreadPool pool(2);
  std::atomic<int> others{0};
  pool.parallel_for(8, [&](int64_t item, int) {
    if (item != 0) {
      others.fetch_add(1);
      return;
    }
    while (others.load() < 7) std::this_thread::yield();
  });
  EXPECT_EQ(others.load(), 7);
}

// Whoever runs item 0 waits until the others are done: its neighbours are taken over from the back.
void expect_streams(bool short_items, int64_t taken_at_once) {
  ThreadPool pool(2);
  constexpr int64_t kItems = 100;
  std::vector<int64_t> order[2];
  std::atomic<int64_t> done{0};
  std::atomic<bool> begun{false};
  pool.parallel_streams(kItems,
                        [&](int64_t item, int thread) {
                          order[thread].push_back(item);
                          // Nobody goes on before the first item is taken: a thread that the system
                          // starts late would find all of its half gone. Then its owner is the slow
                          // one.
                          if (item == 0) begun.store(true);
                          while (!begun.load()) std::this_thread::yield();
                          while (item == 0 && done.load() < kItems - taken_at_once)
                            std::this_thread::yield();
                          done.fetch_add(1);
                        },
                        {.short_items = short_items});
  ASSERT_FALSE(order[0].empty() || order[1].empty());
  const std::vector<int64_t>& slow = order[0].front() == 0 ? order[0] : order[1];
  const std::vector<int64_t>& quick = order[0].front() == 0 ? order[1] : order[0];
  ASSERT_EQ(slow.size(), static_cast<size_t>(taken_at_once));
  for (int64_t i = 0; i < taken_at_once; ++i) EXPECT_EQ(slow[static_cast<size_t>(i)], i);
  ASSERT_EQ(quick.size(), static_cast<size_t>(kItems - taken_at_once));
  for (int64_t i = 0; i < kItems / 2; ++i)  // its own half, in order
    EXPECT_EQ(quick[static_cast<size_t>(i)], kItems / 2 + i);
  for (int64_t i = kItems / 2; i < kItems - taken_at_once; ++i)
    EXPECT_EQ(quick[static_cast<size_t>(i)], kItems - 1 - i);
}

TEST(ThreadPool, AThreadGetsConsecutiveItemsOfStreamsAndIsHelpedFromTheBack) {
  expect_streams(false, 1);
}

TEST(ThreadPool, AThreadTakesAQuarterOfItsShortItemsAtOnce) { expect_streams(true, 12); }

// Both threads are inside before either goes on; the worker then takes its time. A loop that
// returned without waiting for it would leave `done` unset (and hand the worker a dead loop body).
TEST(ThreadPool, ALoopEndsOnlyWhenTheSlowestWorkerHasFinished) {
  ThreadPool pool(2);
  for (int round = 0; round < 5; ++round) {
    std::atomic<int> inside{0};
    std::atomic<bool> done{false};
    pool.parallel_for(2, [&](int64_t, int thread) {
      inside.fetch_add(1);
      while (inside.load() < 2) std::this_thread::yield();
      if (thread == 0) return;
      [[maybe_unused]] volatile int work = 0;
      for (int i = 0; i < 1'000'000; ++i) work = i;
      done.store(true);
    });
    ASSERT_TRUE(done.load());
  }
}

// Steps that threads have taken while they waited, by thread.
struct Waited {
  static constexpr int kThreads = 2;
  std::atomic<int64_t> steps[kThreads] = {};
  std::atomic<bool> in_order{true}, intact{true};
};
struct WaitingState {
  Waited* to;
  int64_t most, mark;
};
constexpr int64_t kMark = 0x5ca1ab1e;
bool count_steps(const WaitingState& state, int thread, int threads, int64_t n) {
  if (state.mark != kMark || threads != Waited::kThreads) state.to->intact = false;
  if (n >= state.most) return false;
  if (state.to->steps[thread].fetch_add(1) != n) state.to->in_order = false;
  return true;
}

// A loop of two items, one for each thread, in which `slow` keeps the other waiting for what
// `until` returns.
template <class Until>
void keep_waiting(ThreadPool& pool, const WaitingState& state, int slow, const Until& until) {
  std::atomic<int> inside{0};
  pool.parallel_streams(2,
                        [&](int64_t, int thread) {
                          inside.fetch_add(1);
                          while (inside.load() < 2) std::this_thread::yield();
                          while (thread == slow && !until()) std::this_thread::yield();
                        },
                        {.meanwhile = Meanwhile::of<count_steps>(state)});
}

TEST(ThreadPool, AThreadThatWaitsForAnotherTakesSteps) {
  for (const int slow : {0, 1}) {
    Waited waited;
    ThreadPool pool(Waited::kThreads);  // ends before what its steps count in
    const WaitingState state{&waited, 1000, kMark};
    const int waiting = 1 - slow;
    keep_waiting(pool, state, slow, [&] { return waited.steps[waiting].load() == 1000; });
    EXPECT_TRUE(waited.in_order);
    EXPECT_TRUE(waited.intact);
    if (slow == 0) {  // nobody is left to be waited for; a worker waits for the next loop
      EXPECT_EQ(waited.steps[0].load(), 0);
    }
  }
}

// Also when the loop is over and its state gone, until the next one begins.
TEST(ThreadPool, AWorkerGoesOnWithItsCopyUntilTheNextLoop) {
  ThreadPool pool(Waited::kThreads);
  for (int round = 0; round < 100; ++round) {
    Waited waited;
    auto state = std::make_unique<WaitingState>(&waited, INT64_MAX, kMark);
    keep_waiting(pool, *state, 0, [&] { return waited.steps[1].load() > 0; });
    *state = {nullptr, 0, 0};
    state.reset();
    const int64_t before = waited.steps[1].load();
    while (waited.steps[1].load() < before + 10) std::this_thread::yield();
    keep_waiting(pool, {&waited, 0, kMark}, 0, [] { return true; });
    const int64_t after = waited.steps[1].load();
    for (int i = 0; i < 10; ++i) pool.parallel_for(2, [](int64_t, int) {});
    EXPECT_EQ(waited.steps[1].load(), after);
    EXPECT_TRUE(waited.in_order);
    EXPECT_TRUE(waited.intact);
  }
}

TEST(ThreadPool, IsDestroyedWhetherOrNotItEverRan) {
  for (int i = 0; i < 50; ++i) {
    ThreadPool idle(4);
    ThreadPool used(4);
    std::atomic<int> count{0};
    used.parallel_for(4, [&](int64_t, int) { count.fetch_add(1); });
    EXPECT_EQ(count.load(), 4);
  }
}

TEST(ThreadPool, ZeroThreadsMeansTheAvailableCores) {
  EXPECT_EQ(ThreadPool(0).threads(), available_cores());
}

#if defined(__linux__)
TEST(AvailableCores, FollowTheAffinityOfTheProcess) {
  cpu_set_t before;
  ASSERT_EQ(sched_getaffinity(0, sizeof(before), &before), 0);
  int first = 0;
  while (!CPU_ISSET(first, &before)) ++first;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(first, &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  EXPECT_EQ(available_cores(), 1);
  ASSERT_EQ(sched_setaffinity(0, sizeof(before), &before), 0);
  EXPECT_LE(available_cores(), CPU_COUNT(&before));
}
#endif

}  // namespace
}  // namespace fq
