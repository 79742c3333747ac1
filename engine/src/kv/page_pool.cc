#include "src/kv/page_pool.h"

#include <sys/mman.h>

#include <cassert>
#include <cerrno>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

namespace fq::kv {
namespace {

constexpr size_t kPageAlignment = 64;
// Pools smaller than this gain nothing from huge pages.
constexpr size_t kHugePageThreshold = size_t{64} << 20;

// xorshift64*: only mixes the order of pages in tests, any generator would do.
class PageShuffler {
 public:
  explicit PageShuffler(uint32_t seed) : state_(0x9E3779B97F4A7C15ull ^ seed) {}
  // A number in [0, bound).
  size_t below(size_t bound) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<size_t>((state_ * 0x2545F4914F6CDD1Dull) >> 11) % bound;
  }

 private:
  uint64_t state_;
};

Error broken(std::string what) {
  return {Code::kInternal, "PagePool::check_integrity: " + std::move(what), ""};
}

}  // namespace

struct PagePool::Impl {
  std::byte* base = nullptr;
  size_t bytes = 0;
  size_t page_bytes = 0;
  int64_t reserved = 0;
  std::vector<int32_t> counts;    // references per page
  std::vector<PageId> free_list;  // a stack: the page released last is the warmest
  bool shuffle = false;
  PageShuffler shuffler{0};

  ~Impl() {
    if (base != nullptr) munmap(base, bytes);
  }
};

PagePool::PagePool() : impl_(std::make_unique<Impl>()) {}
PagePool::~PagePool() = default;

Result<std::unique_ptr<PagePool>> PagePool::create(size_t page_bytes, int64_t pages,
                                                   uint32_t shuffle_seed) {
  if (page_bytes == 0) {
    return Error{Code::kInvalidArgument, "PagePool::create: page_bytes is 0", ""};
  }
  if (pages <= 0 || pages > std::numeric_limits<PageId>::max()) {
    return Error{Code::kInvalidArgument,
                 "PagePool::create: pages is " + std::to_string(pages) + ", must be in [1, 2^31)",
                 "give the engine more memory_bytes, or less"};
  }
  const size_t max_bytes = std::numeric_limits<size_t>::max() / 2 / static_cast<size_t>(pages);
  if (page_bytes > max_bytes - kPageAlignment) {
    return Error{Code::kInvalidArgument,
                 "PagePool::create: " + std::to_string(pages) + " pages of " +
                     std::to_string(page_bytes) + " bytes overflow the address space",
                 ""};
  }
  std::unique_ptr<PagePool> pool(new PagePool());
  Impl& impl = *pool->impl_;
  impl.page_bytes = (page_bytes + kPageAlignment - 1) / kPageAlignment * kPageAlignment;
  const size_t bytes = impl.page_bytes * static_cast<size_t>(pages);
  // NORESERVE: the pool's size is a ceiling, memory is spent when a page is first written.
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return Error{
        Code::kOutOfMemory,
        "PagePool::create: cannot map " + std::to_string(bytes) + " bytes: " + std::strerror(errno),
        "lower memory_bytes"};
  }
  impl.base = static_cast<std::byte*>(base);
  impl.bytes = bytes;
#ifdef MADV_HUGEPAGE
  // Attention streams whole pages, so fewer address translations pay; a refusal costs nothing.
  if (bytes >= kHugePageThreshold) (void)madvise(base, bytes, MADV_HUGEPAGE);
#endif
  impl.counts.assign(static_cast<size_t>(pages), 0);
  impl.free_list.resize(static_cast<size_t>(pages));
  // The stack is popped from its end: page 0 is handed out first.
  std::iota(impl.free_list.rbegin(), impl.free_list.rend(), PageId{0});
  if (shuffle_seed != 0) {
    impl.shuffle = true;
    impl.shuffler = PageShuffler(shuffle_seed);
    for (size_t i = impl.free_list.size(); i > 1; --i) {
      std::swap(impl.free_list[i - 1], impl.free_list[impl.shuffler.below(i)]);
    }
  }
  return pool;
}

bool PagePool::reserve(int64_t pages) {
  if (pages < 0 || pages > available()) return false;
  impl_->reserved += pages;
  return true;
}

void PagePool::unreserve(int64_t pages) {
  assert(pages >= 0 && pages <= impl_->reserved);
  impl_->reserved -= pages;
}

PageId PagePool::take() {
  Impl& impl = *impl_;
  assert(impl.reserved > 0 && !impl.free_list.empty());
  if (impl.shuffle) {
    // Also pages that came back are handed out in no order.
    std::swap(impl.free_list.back(), impl.free_list[impl.shuffler.below(impl.free_list.size())]);
  }
  const PageId page = impl.free_list.back();
  impl.free_list.pop_back();
  --impl.reserved;
  impl.counts[page] = 1;
  return page;
}

void PagePool::retain(PageId page) {
  assert(impl_->counts[page] > 0);
  ++impl_->counts[page];
}

void PagePool::release(PageId page) {
  assert(impl_->counts[page] > 0);
  // The free list has room for every page since create(): no allocation.
  if (--impl_->counts[page] == 0) impl_->free_list.push_back(page);
}

int PagePool::ref_count(PageId page) const { return impl_->counts[page]; }

std::byte* PagePool::data(PageId page) const {
  return impl_->base + static_cast<size_t>(page) * impl_->page_bytes;
}

size_t PagePool::page_bytes() const { return impl_->page_bytes; }
int64_t PagePool::total() const { return static_cast<int64_t>(impl_->counts.size()); }
int64_t PagePool::free_pages() const { return static_cast<int64_t>(impl_->free_list.size()); }
int64_t PagePool::available() const { return free_pages() - impl_->reserved; }
int64_t PagePool::reserved() const { return impl_->reserved; }

Status PagePool::check_integrity(std::span<const PageId> tables_pages) const {
  const Impl& impl = *impl_;
  const int64_t pages = total();
  std::vector<bool> is_free(static_cast<size_t>(pages), false);
  for (PageId page : impl.free_list) {
    if (page < 0 || page >= pages) return broken("free list holds page " + std::to_string(page));
    if (is_free[page]) return broken("page " + std::to_string(page) + " is free twice");
    is_free[page] = true;
  }
  std::vector<int32_t> seen(static_cast<size_t>(pages), 0);
  for (PageId page : tables_pages) {
    if (page < 0 || page >= pages) return broken("a table holds page " + std::to_string(page));
    ++seen[page];
  }
  for (int64_t page = 0; page < pages; ++page) {
    if (is_free[page] != (impl.counts[page] == 0)) {
      return broken("page " + std::to_string(page) + " has " + std::to_string(impl.counts[page]) +
                    " references and is " + (is_free[page] ? "" : "not ") + "in the free list");
    }
    if (seen[page] != impl.counts[page]) {
      return broken("page " + std::to_string(page) + " has " + std::to_string(impl.counts[page]) +
                    " references, tables hold it " + std::to_string(seen[page]) + " times");
    }
  }
  if (impl.reserved < 0 || impl.reserved > free_pages()) {
    return broken(std::to_string(impl.reserved) + " pages are promised, " +
                  std::to_string(free_pages()) + " are free");
  }
  return {};
}

PageTable::PageTable(PageTable&& other) noexcept
    : pool_(other.pool_),
      page_tokens_(other.page_tokens_),
      length_(std::exchange(other.length_, 0)),
      ids_(std::exchange(other.ids_, {})),
      data_(std::exchange(other.data_, {})) {}

PageTable& PageTable::operator=(PageTable&& other) noexcept {
  if (this == &other) return *this;
  clear();
  pool_ = other.pool_;
  page_tokens_ = other.page_tokens_;
  length_ = std::exchange(other.length_, 0);
  ids_ = std::exchange(other.ids_, {});
  data_ = std::exchange(other.data_, {});
  return *this;
}

int64_t PageTable::pages_to_append(int64_t tokens) const {
  if (tokens <= 0) return 0;
  const int64_t fresh =
      pages_for(length_ + tokens, page_tokens_) - pages_for(length_, page_tokens_);
  return fresh + (last_page_is_shared() ? 1 : 0);
}

bool PageTable::last_page_is_shared() const {
  return length_ % page_tokens_ != 0 && pool_->ref_count(ids_.back()) > 1;
}

void PageTable::reserve(int64_t pages) {
  ids_.reserve(static_cast<size_t>(pages));
  data_.reserve(static_cast<size_t>(pages));
}

int64_t PageTable::append(int64_t tokens) {
  assert(tokens >= 0);
  const int64_t needed = pages_to_append(tokens);
  if (needed > pool_->reserved()) return -1;
  if (needed > 0) {
    if (last_page_is_shared()) {
      const PageId copy = pool_->take();
      std::memcpy(pool_->data(copy), data_.back(), pool_->page_bytes());
      pool_->release(ids_.back());
      ids_.back() = copy;
      data_.back() = pool_->data(copy);
    }
    const int64_t pages = pages_for(length_ + tokens, page_tokens_);
    while (static_cast<int64_t>(ids_.size()) < pages) {
      ids_.push_back(pool_->take());
      data_.push_back(pool_->data(ids_.back()));
    }
  }
  length_ += tokens;
  return needed;
}

PageTable PageTable::fork() const {
  PageTable table(pool_, page_tokens_);
  table.length_ = length_;
  table.ids_ = ids_;
  table.data_ = data_;
  for (PageId page : ids_) pool_->retain(page);
  return table;
}

void PageTable::clear() {
  for (PageId page : ids_) pool_->release(page);
  ids_.clear();
  data_.clear();
  length_ = 0;
}

}  // namespace fq::kv
