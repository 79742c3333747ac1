// The shared end of a request's event queue: the engine thread pushes, one consumer takes.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "framequilt/engine.h"
#include "src/core/ring_queue.h"

namespace fq {

struct Stream::Impl {
  explicit Impl(uint64_t request_id) : id(request_id) {}

  // Engine thread. After the finishing event nothing may be pushed.
  void push(Event event) {
    {
      std::lock_guard lock(mutex);
      if (finish_pushed) return;
      finish_pushed = event.finish != FinishReason::kNone;
      events.push(std::move(event));
    }
    changed.notify_all();
  }

  const uint64_t id;
  std::atomic<bool> cancel{false};
  std::weak_ptr<Engine::Impl> engine;  // set by submit; to wake it, or to drive a manual one

  std::mutex mutex;
  std::condition_variable changed;
  RingQueue<Event> events{4};  // guarded by mutex; a consumer that keeps up makes it never grow
  bool finish_pushed = false;  // guarded by mutex
  bool finish_taken = false;   // guarded by mutex
};

}  // namespace fq
