// A fixed pool of worker threads for data-parallel loops. The calling thread works too. One loop at
// a time: only the engine thread calls it. No allocation per loop. Items are handed out
// dynamically; results must not depend on which thread ran which item.
#pragma once

#include <cstdint>
#include <memory>

#include "src/core/function_ref.h"
#include "src/core/meanwhile.h"

namespace fq {

class ThreadPool {
 public:
  // `threads` counts the caller: 1 means no workers. <= 0: one per core available to the process
  // (affinity, cgroup).
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // Calls fn(item, thread) for every item in [0, items); thread in [0, threads()).
  void parallel_for(int64_t items, FunctionRef<void(int64_t item, int thread)> fn);

  struct StreamOptions {
    // Items of some microseconds: a thread takes a quarter of what is left of its range at once.
    // Taking an item is an atomic operation, and waits until all that the core has asked memory for
    // is there. Nobody helps with what a thread has taken, so longer items are taken singly.
    bool short_items = false;
    // A thread that finds nothing left takes these steps until the next loop begins, if need be
    // after this one's call has returned.
    Meanwhile meanwhile = {};
  };
  // The same, where neighbouring items read neighbouring memory: a thread gets consecutive items,
  // so that what it reads is one stream, and helps out at the end of other threads' ranges when its
  // own is done. At most 2^31 items.
  void parallel_streams(int64_t items, FunctionRef<void(int64_t item, int thread)> fn) {
    parallel_streams(items, fn, {});
  }
  void parallel_streams(int64_t items, FunctionRef<void(int64_t item, int thread)> fn,
                        const StreamOptions& options);

  // Where the range of `thread` begins among `items` of parallel_streams.
  static int64_t stream_begin(int64_t items, int thread, int threads) {
    return items * thread / threads;
  }

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Cores this process may use.
int available_cores();

}  // namespace fq
