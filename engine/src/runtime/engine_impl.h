// The engine loop: takes submitted requests, lets the scheduler choose and the executor compute,
// samples, streams. Everything below "engine thread" in this class is touched by one thread at a
// time: the engine's own, or whoever calls step() on a manual engine.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "framequilt/engine.h"
#include "framequilt/tokenizer.h"
#include "src/blocks/decoder.h"
#include "src/blocks/vision.h"
#include "src/runtime/executor.h"
#include "src/runtime/scheduler.h"

namespace fq {

class Engine::Impl : public std::enable_shared_from_this<Engine::Impl> {
 public:
  static Result<std::shared_ptr<Impl>> create(std::shared_ptr<const Model> model,
                                              const EngineOptions& options);

  Stream submit(Request request);
  bool step();
  void start_thread();
  void wake();
  void close();
  bool manual() const { return options_.manual_step; }

  MemoryPlan plan() const { return plan_; }
  EngineStats stats() const;
  Status check_integrity();
  std::string describe_kernels() const;

 private:
  Impl() = default;

  // Any thread.
  Result<std::unique_ptr<runtime::Sequence>> prepare(Request request,
                                                     std::shared_ptr<Stream::Impl> stream) const;
  Status check_request(const Request& request) const;

  // Engine thread.
  void thread_main();
  void drain_inbox();
  void cancel_flagged();
  void run_unit(runtime::Sequence& sequence);
  void run_batch();
  void on_logits(runtime::Sequence& sequence, std::span<float> logits);
  void finish(runtime::Sequence& sequence, FinishReason reason, Event event,
              std::optional<Error> error = {});
  void fail(runtime::Sequence& sequence, Error error) {
    finish(sequence, FinishReason::kError, {}, std::move(error));
  }
  void publish_stats();
  Status check_integrity_now();
  // Runs fn on the engine thread (or here, on a manual or closed engine) and waits for it.
  void run_on_engine(const std::function<void()>& fn);

  EngineOptions options_;
  MemoryPlan plan_;
  std::shared_ptr<const Model> model_;
  std::shared_ptr<const Tokenizer> tokenizer_;  // null when options_.text is false
  std::unique_ptr<const backend::Backend> backend_;
  std::unique_ptr<ThreadPool> threads_;
  std::unique_ptr<const blocks::Decoder> decoder_;
  std::unique_ptr<const blocks::Vision> vision_;  // null for text models
  int max_context_ = 0;
  kv::LayerPools::Plan pool_plan_;

  // Engine thread.
  std::unique_ptr<kv::LayerPools> pools_;
  std::unique_ptr<runtime::Scheduler> scheduler_;
  std::unique_ptr<runtime::Executor> executor_;
  std::vector<runtime::BatchItem> batch_;
  std::mutex step_mutex_;  // manual engines may be stepped from several threads: one at a time

  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::vector<std::unique_ptr<runtime::Sequence>> inbox_;
  std::vector<std::function<void()>> commands_;
  std::vector<std::weak_ptr<Stream::Impl>> live_;  // to cancel what runs when the engine closes
  bool closing_ = false;
  bool closed_ = false;
  uint64_t next_id_ = 1;
  EngineStats stats_;

  std::mutex close_mutex_;  // one caller of close() closes, the others wait for it
  std::thread thread_;      // joined under close_mutex_
};

}  // namespace fq
