// Workers wait for a loop at a gate: one atomic word that holds the loop's number, whether it is
// open, and how many workers joined it. A loop waits for those who joined only, so a worker that
// the system has not woken yet delays nobody; it finds the gate closed and goes back to sleep.
// Workers spin for some microseconds before they sleep, because the loops of one decode step follow
// each other closely.
#include "src/core/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "src/core/cpu_quota.h"

namespace fq {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kSpins = 2000;  // some 10 to 50 microseconds, about what a futex wake-up costs

// Gate: [loop number : 47][open : 1][joined workers : 16].
constexpr uint64_t kJoinedMask = 0xffff;
constexpr uint64_t kOpen = 1u << 16;
constexpr int kLoopShift = 17;

void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int affinity_cores() {
#if defined(__linux__)
  // The kernel refuses a set smaller than its own: grow until it fits.
  for (size_t cpus = 1024; cpus <= size_t{1} << 20; cpus *= 4) {
    cpu_set_t* set = CPU_ALLOC(cpus);
    if (set == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(cpus);
    const int count = sched_getaffinity(0, bytes, set) == 0 ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (count > 0) return count;
  }
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

int available_cores() {
  const int cores = affinity_cores();
  const int quota = cgroup_cpu_quota();
  return quota > 0 ? std::min(cores, quota) : cores;
}

struct ThreadPool::Impl {
  using Body = FunctionRef<void(int64_t, int)>;

  // The loop that runs now. Written by the caller while the gate is closed, read by those who
  // joined.
  const Body* body = nullptr;
  int64_t items = 0;
  StreamOptions stream;

  alignas(64) std::atomic<uint64_t> gate{0};
  alignas(64) std::atomic<int64_t> next_item{0};

  // Of a loop in streams: what is left of each thread's range, [begin : 32][end : 32]. Its owner
  // takes items from the front, helpers from the back.
  struct alignas(64) Range {
    std::atomic<uint64_t> left{0};
  };
  bool streams = false;
  std::vector<Range> ranges;

  alignas(64) std::atomic<uint64_t> left{0};  // workers that joined this loop and finished
  std::atomic<bool> stop{false};

  // Sleeping. Each side announces itself, then looks again; all four accesses are sequentially
  // consistent, so at least one side sees the other. The mutex then orders the announcement before
  // the notification.
  std::mutex mutex;
  std::condition_variable work, finished;
  std::atomic<int> sleepers{0};
  std::atomic<bool> caller_sleeps{false};

  std::vector<std::thread> workers;

  int threads() const { return static_cast<int>(workers.size()) + 1; }

  void run_items(int thread) {
    if (streams) return run_stream(thread);
    const Body& call = *body;
    const int64_t count = items;
    for (int64_t i = next_item.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next_item.fetch_add(1, std::memory_order_relaxed)) {
      call(i, thread);
    }
  }

  static int64_t count_left(uint64_t range) {
    return static_cast<int64_t>(range & 0xffffffff) - static_cast<int64_t>(range >> 32);
  }

  void run_stream(int thread) {
    const Body& call = *body;
    std::atomic<uint64_t>& own = ranges[static_cast<size_t>(thread)].left;
    uint64_t range = own.load(std::memory_order_relaxed);
    while (count_left(range) > 0) {
      const auto first = static_cast<int64_t>(range >> 32);
      const int64_t taken = stream.short_items ? std::max<int64_t>(1, count_left(range) / 4) : 1;
      if (own.compare_exchange_weak(range, range + (static_cast<uint64_t>(taken) << 32),
                                    std::memory_order_relaxed)) {
        for (int64_t i = first; i < first + taken; ++i) call(i, thread);
        range = own.load(std::memory_order_relaxed);
      }
    }
    while (Range* const victim = longest_range()) {
      range = victim->left.load(std::memory_order_relaxed);
      if (count_left(range) > 0 &&
          victim->left.compare_exchange_weak(range, range - 1, std::memory_order_relaxed)) {
        call(static_cast<int64_t>(range & 0xffffffff) - 1, thread);
      }
    }
  }

  // The range with most items left, if any is left.
  Range* longest_range() {
    Range* longest = nullptr;
    int64_t most = 0;
    for (Range& range : ranges) {
      const int64_t left = count_left(range.left.load(std::memory_order_relaxed));
      if (left > most) longest = &range, most = left;
    }
    return longest;
  }

  // A loop over `count` items, announced to the workers. What it works on is set up before.
  void run_loop(const Body& fn, int64_t count) {
    body = &fn;
    items = count;
    left.store(0, std::memory_order_relaxed);
    const uint64_t loop = (gate.load(std::memory_order_relaxed) >> kLoopShift) + 1;
    gate.store(loop << kLoopShift | kOpen);
    wake(count - 1);
    run_items(0);
    close_and_wait();
  }

  // Joins the open loop, if there is one that is not `seen`; then `seen` is its number.
  bool join(uint64_t& seen) {
    uint64_t now = gate.load(std::memory_order_acquire);
    while ((now & kOpen) != 0 && (now >> kLoopShift) != seen) {
      if (gate.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) {
        seen = now >> kLoopShift;
        return true;
      }
    }
    return false;
  }

  void leave() {
    left.fetch_add(1);
    if (caller_sleeps.load()) {
      const std::lock_guard<std::mutex> lock(mutex);
      finished.notify_one();
    }
  }

  // Something that a worker waits for: a new loop, or the end.
  bool called(uint64_t seen) const {
    const uint64_t now = gate.load();
    return ((now & kOpen) != 0 && (now >> kLoopShift) != seen) || stop.load();
  }

  // A worker's part of a loop that it has joined, and what it does until the next.
  void take_part(int thread, uint64_t loop) {
    const Meanwhile waiting = stream.meanwhile;
    waiting.prefetch();
    run_items(thread);
    Meanwhile::Copy copy;
    if (waiting) waiting.copy(&copy);
    leave();
    if (waiting) waiting.run(copy, thread, threads(), [&] { return called(loop); });
  }

  void work_loop(int thread) {
    uint64_t seen = 0;
    while (true) {
      for (int spin = 0; spin < kSpins && !called(seen); ++spin) pause_cpu();
      if (!called(seen)) {
        std::unique_lock<std::mutex> lock(mutex);
        sleepers.fetch_add(1);
        work.wait(lock, [&] { return called(seen); });
        sleepers.fetch_sub(1);
      }
      if (stop.load()) return;
      if (join(seen)) take_part(thread, seen);
    }
  }

  void wake(int64_t wanted) {
    const int asleep = sleepers.load();
    if (asleep == 0) return;
    const std::lock_guard<std::mutex> lock(mutex);
    if (wanted >= asleep) {
      work.notify_all();
    } else {
      for (int64_t i = 0; i < wanted; ++i) work.notify_one();
    }
  }

  // Closes the gate and waits for the workers who joined.
  void close_and_wait() {
    const uint64_t joined = gate.fetch_and(~kOpen) & kJoinedMask;
    if (stream.meanwhile && left.load() != joined) {
      Meanwhile::Copy copy;
      stream.meanwhile.copy(&copy);
      stream.meanwhile.run(copy, 0, threads(), [&] { return left.load() == joined; });
    }
    for (int spin = 0; spin < kSpins; ++spin) {
      if (left.load() == joined) return;
      pause_cpu();
    }
    std::unique_lock<std::mutex> lock(mutex);
    // A store would do. But qemu runs Arm's store-release and load-acquire without the order
    // between them, and the caller would sleep forever; on x86 a store of this kind is an exchange
    // anyway.
    caller_sleeps.exchange(true);
    finished.wait(lock, [&] { return left.load() == joined; });
    caller_sleeps.store(false);
  }
};

ThreadPool::ThreadPool(int threads) : impl_(std::make_unique<Impl>()) {
  if (threads <= 0) threads = available_cores();
  threads = std::min(threads, kMaxThreads);
  impl_->ranges = std::vector<Impl::Range>(static_cast<size_t>(threads));
  impl_->workers.reserve(static_cast<size_t>(threads - 1));
  for (int i = 1; i < threads; ++i) {
    try {
      impl_->workers.emplace_back([impl = impl_.get(), i] { impl->work_loop(i); });
    } catch (const std::system_error&) {
      break;  // the system allows no more threads: fewer workers give the same results, and
              // threads() tells
    }
  }
}

ThreadPool::~ThreadPool() {
  impl_->stop.store(true);
  {
    const std::lock_guard<std::mutex> lock(impl_->mutex);
    impl_->work.notify_all();
  }
  for (std::thread& worker : impl_->workers) worker.join();
}

int ThreadPool::threads() const { return impl_->threads(); }

void ThreadPool::parallel_for(int64_t items, FunctionRef<void(int64_t item, int thread)> fn) {
  if (items <= 1 || impl_->workers.empty()) {
    for (int64_t i = 0; i < items; ++i) fn(i, 0);
    return;
  }
  impl_->streams = false;
  impl_->stream = {};
  impl_->next_item.store(0, std::memory_order_relaxed);
  impl_->run_loop(fn, items);
}

void ThreadPool::parallel_streams(int64_t items, FunctionRef<void(int64_t item, int thread)> fn,
                                  const StreamOptions& options) {
  if (items <= 1 || impl_->workers.empty()) {
    for (int64_t i = 0; i < items; ++i) fn(i, 0);
    return;
  }
  impl_->streams = true;
  impl_->stream = options;
  const int count = threads();
  for (int t = 0; t < count; ++t) {
    const auto begin = static_cast<uint64_t>(stream_begin(items, t, count));
    const auto end = static_cast<uint64_t>(stream_begin(items, t + 1, count));
    impl_->ranges[static_cast<size_t>(t)].left.store(begin << 32 | end, std::memory_order_relaxed);
  }
  impl_->run_loop(fn, items);
}

}  // namespace fq
