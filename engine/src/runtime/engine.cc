// The public face of the engine and its streams.
#include "framequilt/engine.h"

#include <chrono>

#include "src/runtime/engine_impl.h"

namespace fq {

std::string_view finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kError:
      return "error";
  }
  return "";
}

Result<std::unique_ptr<Engine>> Engine::create(std::shared_ptr<const Model> model,
                                               const EngineOptions& options) {
  FQ_ASSIGN_OR_RETURN(auto impl, Impl::create(std::move(model), options));
  if (!options.manual_step) impl->start_thread();
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

Engine::Engine(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() { impl_->close(); }

Stream Engine::submit(Request request) { return impl_->submit(std::move(request)); }
bool Engine::step() { return impl_->step(); }
void Engine::run() {
  while (impl_->step()) {
  }
}
MemoryPlan Engine::plan() const { return impl_->plan(); }
EngineStats Engine::stats() const { return impl_->stats(); }
Status Engine::check_integrity() const { return impl_->check_integrity(); }
std::string Engine::describe_kernels() const { return impl_->describe_kernels(); }
void Engine::close() { impl_->close(); }

Stream::Stream() = default;
Stream::Stream(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Stream::Stream(Stream&&) noexcept = default;
Stream& Stream::operator=(Stream&& other) noexcept {
  if (this != &other) {
    if (impl_) cancel();
    impl_ = std::move(other.impl_);
  }
  return *this;
}
Stream::~Stream() {
  if (impl_) cancel();
}

uint64_t Stream::id() const { return impl_ ? impl_->id : 0; }

bool Stream::done() const {
  if (!impl_) return true;
  std::lock_guard lock(impl_->mutex);
  return impl_->finish_taken;
}

void Stream::cancel() {
  if (!impl_) return;
  impl_->cancel.store(true, std::memory_order_relaxed);
  if (auto engine = impl_->engine.lock()) engine->wake();
}

std::optional<Event> Stream::next() { return next_for(-1.0); }

std::optional<Event> Stream::next_for(double seconds) {
  if (!impl_) return std::nullopt;
  const bool forever = seconds < 0;
  const auto deadline = std::chrono::steady_clock::now() +
                        std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                            std::chrono::duration<double>(forever ? 0.0 : std::min(seconds, 1e6)));
  // A manual engine has no thread of its own: whoever waits drives it.
  if (auto engine = impl_->engine.lock(); engine && engine->manual()) {
    for (;;) {
      {
        std::lock_guard lock(impl_->mutex);
        if (!impl_->events.empty() || impl_->finish_taken) break;
      }
      if (!forever && std::chrono::steady_clock::now() >= deadline) return std::nullopt;
      if (!engine->step()) break;
    }
  }
  std::unique_lock lock(impl_->mutex);
  const auto ready = [this] { return !impl_->events.empty() || impl_->finish_taken; };
  if (forever) {
    impl_->changed.wait(lock, ready);
  } else if (!impl_->changed.wait_until(lock, deadline, ready)) {
    return std::nullopt;
  }
  if (impl_->events.empty()) return std::nullopt;
  Event event = impl_->events.pop();
  impl_->finish_taken = event.finish != FinishReason::kNone;
  return event;
}

}  // namespace fq
