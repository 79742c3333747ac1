// What threads do while they wait for others: short steps, of a state that they copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fq {

// step(state, thread, threads, n) -> bool for n = 0, 1, ... until it returns false. The state is
// referred to like the body of a loop. A thread copies it while the loop runs, and may be at its
// steps when the state is gone: they read nothing else.
class Meanwhile {
 public:
  static constexpr size_t kMostBytes = 128;
  struct Copy {
    alignas(64) std::byte bytes[kMostBytes];
  };

  Meanwhile() = default;
  template <auto kStep, class State>
  static Meanwhile of(const State& state) {
    static_assert(std::is_trivially_copyable_v<State> && sizeof(State) <= kMostBytes);
    Meanwhile meanwhile;
    meanwhile.state_ = &state;
    meanwhile.bytes_ = sizeof(State);
    meanwhile.step_ = [](const void* at, int thread, int threads, int64_t n) -> bool {
      return kStep(*static_cast<const State*>(at), thread, threads, n);
    };
    return meanwhile;
  }

  explicit operator bool() const { return step_ != nullptr; }
  // Has the state in cache by the time it is copied.
  void prefetch() const {
    for (size_t i = 0; i < bytes_; i += 64)
      __builtin_prefetch(static_cast<const std::byte*>(state_) + i);
  }
  void copy(Copy* to) const { std::memcpy(to->bytes, state_, bytes_); }

  // Steps until they or `ended()` end it.
  template <class Ended>
  void run(const Copy& copy, int thread, int threads, const Ended& ended) const {
    for (int64_t n = 0; !ended() && step_(copy.bytes, thread, threads, n);) ++n;
  }

 private:
  const void* state_ = nullptr;
  size_t bytes_ = 0;
  bool (*step_)(const void*, int, int, int64_t) = nullptr;
};

}  // namespace fq
