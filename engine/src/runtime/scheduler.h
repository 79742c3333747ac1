// Who runs next: first come, first served admission against the page pool, and the make-up of each
// token-major pass. Knows counts of rows and pages, not what they mean. Engine thread only.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "src/kv/layer_pools.h"
#include "src/runtime/executor.h"
#include "src/runtime/sequence.h"

namespace fq::runtime {

class Scheduler {
 public:
  Scheduler(kv::LayerPools* pools, int page_tokens, int chunk_rows, int max_sequences)
      : pools_(pools),
        page_tokens_(page_tokens),
        chunk_rows_(chunk_rows),
        max_sequences_(max_sequences) {}

  void enqueue(std::unique_ptr<Sequence> sequence) { waiting_.push_back(std::move(sequence)); }

  // Pages that a sequence may need at most in a layer, which then holds the whole prompt and the
  // answer.
  static int64_t page_bound(int64_t prompt_rows, int max_tokens, int page_tokens) {
    // The last token is never fed back, so it needs no room.
    return kv::PageTable::pages_for(prompt_rows + max_tokens - 1, page_tokens);
  }

  // Moves waiting sequences into the running set, in order, while pages and places last. All or
  // nothing for each.
  void admit();

  // The sequence that gets this step's unit of vision or layer-major work; nullptr when there is
  // none.
  Sequence* unit_of_work();

  // Rows of this step's token-major pass: every decode row, then prompt chunks in order of arrival.
  void compose(std::vector<BatchItem>* items);

  // Returns a sequence's pages and promises.
  void release(Sequence& sequence);

  // After a reduced prefill: returns promises for rows that the deeper layers will never hold.
  void return_surplus(Sequence& sequence);

  // Takes finished sequences out, returning all their pages.
  void retire();

  // Calls fn for every sequence, waiting and running.
  template <class F>
  void for_each(F&& fn) {
    for (auto& s : running_) fn(*s);
    for (auto& s : waiting_) fn(*s);
  }

  bool empty() const { return running_.empty() && waiting_.empty(); }
  int running() const { return static_cast<int>(running_.size()); }
  int waiting() const { return static_cast<int>(waiting_.size()); }
  const std::vector<std::unique_ptr<Sequence>>& running_sequences() const { return running_; }

 private:
  kv::LayerPools* pools_;
  int page_tokens_, chunk_rows_, max_sequences_;
  std::deque<std::unique_ptr<Sequence>> waiting_;
  std::vector<std::unique_ptr<Sequence>> running_;  // in order of admission
};

}  // namespace fq::runtime
