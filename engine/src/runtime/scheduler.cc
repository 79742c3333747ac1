#include "src/runtime/scheduler.h"

#include <algorithm>

namespace fq::runtime {

void Scheduler::admit() {
  while (!waiting_.empty() && running() < max_sequences_) {
    Sequence& next = *waiting_.front();
    const int64_t pages = page_bound(next.prompt.rows(), next.max_tokens, page_tokens_);
    if (!pools_->reserve(pages)) return;  // strict order: nobody overtakes a large request
    next.reserved.assign(static_cast<size_t>(pools_->layers()), pages);
    next.tables.reserve(next.reserved.size());
    for (int l = 0; l < pools_->layers(); ++l) {
      next.tables.emplace_back(&pools_->pool(l), page_tokens_);
      next.tables.back().reserve(pages);
    }
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
  for (size_t l = 0; l < sequence.tables.size(); ++l) {
    const kv::PageTable& table = sequence.tables[l];
    const int64_t needed =
        kv::PageTable::pages_for(table.length() + sequence.max_tokens - 1, page_tokens_) -
        static_cast<int64_t>(table.ids().size());
    if (needed < sequence.reserved[l]) {
      pools_->unreserve(static_cast<int>(l), sequence.reserved[l] - needed);
      sequence.reserved[l] = needed;
    }
  }
}

void Scheduler::release(Sequence& sequence) {
  sequence.tables.clear();
  for (size_t l = 0; l < sequence.reserved.size(); ++l)
    pools_->unreserve(static_cast<int>(l), sequence.reserved[l]);
  sequence.reserved.clear();
}

void Scheduler::retire() {
  const auto retire_one = [this](std::unique_ptr<Sequence>& s) {
    if (s->phase != Phase::kDone) return false;
    release(*s);
    return true;
  };
  std::erase_if(running_, retire_one);
  std::erase_if(waiting_, retire_one);
}

}  // namespace fq::runtime
