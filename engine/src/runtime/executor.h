// Carries out units of work on sequences: one tower layer of one frame batch, one decoder layer of
// a layer-major prefill, or one token-major pass over rows of several sequences. Owns the workspace
// (allocated once) and knows no queues: the scheduler decides what runs, the engine what happens to
// results. Engine thread only.
#pragma once

#include <memory>
#include <vector>

#include "src/blocks/decoder.h"
#include "src/blocks/vision.h"
#include "src/core/aligned.h"
#include "src/core/thread_pool.h"
#include "src/runtime/sequence.h"

namespace fq::runtime {

// Rows of one sequence in a token-major pass.
struct BatchItem {
  Sequence* sequence = nullptr;
  int64_t rows = 0;  // 1 when decoding, else prompt rows from sequence->prefilled on
  // Set by the pass:
  int64_t row = 0;       // first row in the batch
  int64_t live = 0;      // rows there: all, and in the end those that logits are made of
  bool dropped = false;  // cancelled on the way: no result
};

// Receives the logits of one row, [vocab], modifiable.
using LogitsFn = FunctionRef<void(Sequence&, std::span<float> logits)>;

class Executor {
 public:
  Executor(const blocks::Decoder& decoder, const blocks::Vision* vision,
           const backend::Backend& backend, ThreadPool& pool, int chunk_rows, int max_sequences);

  // Bytes of workspace an executor of this shape holds (without allocating it).
  static uint64_t workspace_bytes(const blocks::Decoder& decoder, const blocks::Vision* vision,
                                  int chunk_rows, int max_sequences);

  // One unit of vision work. Returns true when all media of the sequence are encoded.
  bool vision_unit(Sequence& sequence);

  // One layer of a layer-major prefill. Returns true when the last layer is done; `on_logits` has
  // then been called with the logits of the last prompt row. Errors: invalid_argument (reduction
  // options).
  Result<bool> layer_unit(Sequence& sequence, LogitsFn on_logits);

  // One pass over the items. Rows of sequences that are cancelled on the way are dropped at a layer
  // boundary. `on_logits` is called for every item whose last row ends the prompt or is a decode
  // row.
  void token_pass(std::span<BatchItem> items, LogitsFn on_logits);

  // Most rows of one token-major pass.
  int64_t max_rows() const { return max_rows_; }

 private:
  void fill_row(const Sequence& sequence, int64_t prompt_row, float* out) const;
  Status begin_layer_major(Sequence& sequence);
  void reduce(Sequence& sequence, int call, const float* importance);
  // Keeps the last keep(item) live rows of each item and moves them together; returns their number.
  int64_t compact(std::span<BatchItem> items, FunctionRef<int64_t(const BatchItem&)> keep);
  // Takes rows of cancelled sequences out of the batch; returns the rows left.
  int64_t drop_cancelled(std::span<BatchItem> items);
  // segments_: the live rows, whose tokens are the last ones of the layer's KV.
  void set_segments(std::span<const BatchItem> items, size_t layer);
  void collect_prompt_logits(const BatchItem& item);
  void begin_vision_batch(Sequence& sequence);
  void end_vision_batch(Sequence& sequence);

  const blocks::Decoder& decoder_;
  const blocks::Vision* vision_;
  const backend::Backend& backend_;
  ThreadPool& pool_;
  const int64_t chunk_rows_;
  const int64_t max_rows_;

  AlignedBuffer<float> x_;          // [max_rows, hidden] of a token-major pass
  AlignedBuffer<float> scratch_;    // of any block
  AlignedBuffer<float> head_rows_;  // [kHeadRows, hidden] gathered rows, then their norm
  AlignedBuffer<float> logits_;     // [kHeadRows, vocab]
  std::vector<int32_t> positions_;
  std::vector<blocks::KvSegment> segments_;
  std::vector<ops::AttentionArgs> attention_items_;
};

}  // namespace fq::runtime
