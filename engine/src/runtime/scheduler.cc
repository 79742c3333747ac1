#include "src/runtime/scheduler.h"

#include <algorithm>

namespace fq::runtime {

void Scheduler::admit() {
  while (!waiting_.empty() && running() < max_sequences_) {
    Sequence& next = *waiting_.front();
    const int64_t pages = page_bound(next.prompt.rows(), next.max_tokens, layers_, page_tokens_);
    if (!pool_->reserve(pages)) return;  // strict order: nobody overtakes a large request
    next.reserved_pages = pages;
    next.tables.reserve(static_cast<size_t>(layers_));
    for (int l = 0; l < layers_; ++l) next.tables.emplace_back(pool_, page_tokens_);
    next.admitted = Clock::now();
    next.usage.timings.queue_ms = ms_between(next.submitted, next.admitted);
    next.phase = next.prompt.media_rows > 0 ? Phase::kVision : Phase::kChunks;
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

Sequence* Scheduler::unit_of_work() {
  for (auto& s : running_) {
    if (s->phase == Phase::kVision || s->phase == Phase::kLayerMajor) return s.get();
  }
  return nullptr;
}

void Scheduler::compose(std::vector<BatchItem>* items) {
  items->clear();
  for (auto& s : running_) {
    if (s->phase == Phase::kDecode) items->push_back({.sequence = s.get(), .rows = 1});
  }
  int64_t room = chunk_rows_;
  for (auto& s : running_) {
    if (s->phase != Phase::kChunks || room == 0) continue;
    const int64_t rows = std::min(room, s->prompt.rows() - s->prefilled);
    items->push_back({.sequence = s.get(), .rows = rows});
    room -= rows;
  }
}

void Scheduler::return_surplus(Sequence& sequence) {
  int64_t needed = 0;
  for (const kv::PageTable& table : sequence.tables) {
    needed += kv::PageTable::pages_for(table.length() + sequence.max_tokens - 1, page_tokens_) -
              static_cast<int64_t>(table.ids().size());
  }
  if (needed < sequence.reserved_pages) {
    pool_->unreserve(sequence.reserved_pages - needed);
    sequence.reserved_pages = needed;
  }
}

void Scheduler::retire() {
  const auto retire_one = [this](std::unique_ptr<Sequence>& s) {
    if (s->phase != Phase::kDone) return false;
    s->tables.clear();
    pool_->unreserve(s->reserved_pages);
    s->reserved_pages = 0;
    return true;
  };
  std::erase_if(running_, retire_one);
  std::erase_if(waiting_, retire_one);
}

}  // namespace fq::runtime
