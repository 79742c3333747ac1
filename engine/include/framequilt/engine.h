// The engine: admits requests, runs them together, streams their tokens.
// Thread-safe. One engine thread (or the caller of step()) owns all scheduling state; a fixed pool
// computes.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "framequilt/model.h"
#include "framequilt/request.h"
#include "framequilt/status.h"

namespace fq {

struct EngineOptions {
  // "kv16", "kv8", "k8v4", "kv4g32+ends16", ... (CONTRACT, section 2); "": the model's default.
  std::string kv = "";
  // Inputs of linears: "a16" (float32), "abf16" (rounded to bfloat16), or quantized: "a8", "a4",
  // "a8-asym", ...; "": as the model says. Holds for every linear with affine weights (abf16: or
  // bf16 ones) but the head, whose inputs stay float32 unless it is named: "a8,head=a8".
  // The attention of a vision tower has to be named likewise: "a8,attention=a8" is with queries and
  // keys in 8 bits, the only ones that it takes.
  std::string activations = "";
  // How quantized or rounded inputs are multiplied: "int" (integer or bfloat16 products) or "exact"
  // (float32 products of the numbers that they stand for: the definition, slow, to compare with).
  std::string numerics = "int";
  uint64_t memory_bytes = 1ull << 30;  // KV pages + workspace; weights are mapped and not counted
  int threads = 0;                     // 0: one per physical core available to the process
  int chunk_rows = 512;    // rows of one prefill step (and of one tile in layer-major prefill)
  int max_sequences = 64;  // admitted at once; more wait in FIFO order
  int max_context = 0;     // 0: the model's
  std::string simd =
      "";  // "" best available | "scalar" (references) | a Highway target name, for tests
  uint32_t page_shuffle_seed = 0;  // tests: hand out pages in a shuffled order
  bool manual_step = false;        // true: no engine thread, the caller drives step()
  bool text =
      true;  // false: no tokenizer is opened; events carry tokens only, stop strings are refused
};

// Where a model's memory goes, before anything is allocated.
struct MemoryPlan {
  uint64_t weight_bytes = 0;
  uint64_t workspace_bytes = 0;
  uint64_t kv_bytes = 0;    // pool size
  uint64_t page_bytes = 0;  // of a layer; with "+ends16" of those between the first and the last
  int64_t pages = 0;
  int64_t tokens = 0;  // tokens of one unreduced sequence that the pool can hold
};

struct EngineStats {
  int running = 0;
  int waiting = 0;
  int64_t pages_total = 0;
  int64_t pages_free = 0;
  int64_t steps = 0;
};

class Engine;

// The receiving end of one request. Movable; leaving it cancels the request. One consumer thread at
// a time.
class Stream {
 public:
  struct Impl;
  Stream();
  ~Stream();
  Stream(Stream&&) noexcept;
  Stream& operator=(Stream&&) noexcept;

  // Blocks until the next event; empty after the finishing event was taken. With manual_step
  // engines the call drives the engine itself.
  std::optional<Event> next();
  // As next(), but gives up after `seconds` and returns an empty optional; done() tells the two
  // apart.
  std::optional<Event> next_for(double seconds);
  bool done() const;  // the finishing event was taken
  // Takes effect at the next layer boundary; the finishing event says kCancelled. Any thread.
  void cancel();
  uint64_t id() const;

 private:
  friend class Engine;
  explicit Stream(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

class Engine {
 public:
  class Impl;

  // Binds every block to kernels, reserves the KV pool. Errors: invalid_argument, unsupported,
  // out_of_memory.
  static Result<std::unique_ptr<Engine>> create(std::shared_ptr<const Model> model,
                                                const EngineOptions& options = {});
  // Cancels what runs, waits for the engine thread.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Never fails by itself: a request that cannot run yields one finishing event with its error.
  Stream submit(Request request);

  // Drives the engine until there is nothing to do, or does one step (one layer of a layer-major
  // prefill, or one pass of a token-major batch). Only for manual_step engines. Returns whether
  // work remains.
  bool step();
  void run();

  MemoryPlan plan() const;
  EngineStats stats() const;
  // Walks pool, tables and sequences; says which invariant is broken. Safe at any time.
  Status check_integrity() const;
  // Kernel chosen for each kind of block: "linear w4g128: avx2", ...
  std::string describe_kernels() const;
  // What the destructor does. Any thread, any number of times: when it returns, nothing runs.
  void close();

 private:
  explicit Engine(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;  // shared with streams, which may outlive the engine
};

}  // namespace fq
