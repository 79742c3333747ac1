// Pages of equal size, reference-counted, and the tables that string them together: one table per
// (sequence, layer). Knows bytes, not meaning. Used by the engine thread only. Allocation happens
// once, when the pool is made (the operating system commits pages when they are first touched).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "framequilt/status.h"

namespace fq::kv {

using PageId = int32_t;

class PagePool {
 public:
  // page_bytes is rounded up to 64. Errors: invalid_argument, out_of_memory.
  static Result<std::unique_ptr<PagePool>> create(size_t page_bytes, int64_t pages,
                                                  uint32_t shuffle_seed = 0);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // Admission: promises `pages` future takes. Changes nothing and returns false when they are not
  // there.
  bool reserve(int64_t pages);
  void unreserve(int64_t pages);  // returns promises not used

  // Takes a promised page (consumes one reservation). Reference count 1. Never fails after
  // reserve().
  PageId take();
  void retain(PageId page);
  void release(PageId page);  // freed when the count reaches 0
  int ref_count(PageId page) const;

  std::byte* data(PageId page) const;
  size_t page_bytes() const;
  int64_t total() const;
  int64_t free_pages() const;  // not taken
  int64_t available() const;   // not taken and not promised
  int64_t reserved() const;

  // Free list and counts agree, no page twice in the free list, promises are covered, and the
  // counts equal how often each page occurs in `tables_pages` (all page ids of all live tables).
  Status check_integrity(std::span<const PageId> tables_pages) const;

 private:
  PagePool();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Length and pages of one layer of one sequence. Append-only. Returns its pages when destroyed.
class PageTable {
 public:
  PageTable(PagePool* pool, int page_tokens) : pool_(pool), page_tokens_(page_tokens) {}
  ~PageTable() { clear(); }
  PageTable(PageTable&& other) noexcept;
  PageTable& operator=(PageTable&& other) noexcept;

  int64_t length() const { return length_; }
  // Room for the ids of `pages` pages, so that append() allocates nothing up to there.
  void reserve(int64_t pages);
  // Makes room for `tokens` more (takes promised pages; copies a shared last page first) and
  // advances the length. Returns the pages taken, or -1 with nothing changed when the pool holds
  // fewer promises than that.
  int64_t append(int64_t tokens);
  // Pages that append(tokens) would take now: the new ones, and one for the copy of a shared last
  // page.
  int64_t pages_to_append(int64_t tokens) const;
  std::byte* const* pages() const { return data_.data(); }
  std::span<const PageId> ids() const { return ids_; }
  // Pages needed to append `tokens` to a table of length `length`.
  static int64_t pages_for(int64_t tokens, int page_tokens) {
    return (tokens + page_tokens - 1) / page_tokens;
  }
  // A table with the same pages, shared; the partial last page is copied by whoever appends next.
  PageTable fork() const;
  void clear();

 private:
  bool last_page_is_shared() const;

  PagePool* pool_;
  int page_tokens_;
  int64_t length_ = 0;
  std::vector<PageId> ids_;
  std::vector<std::byte*> data_;
};

}  // namespace fq::kv
