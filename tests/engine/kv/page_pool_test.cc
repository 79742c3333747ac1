// Page pool and page tables against a naive model: what a table must contain, who holds which page,
// and what is promised. Integrity is checked after every operation.
#include "src/kv/page_pool.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>
#include <set>

namespace fq::kv {
namespace {

std::unique_ptr<PagePool> make_pool(size_t page_bytes, int64_t pages, uint32_t seed = 0) {
  auto pool = PagePool::create(page_bytes, pages, seed);
  EXPECT_TRUE(pool.ok()) << pool.status().error().to_string();
  return std::move(*pool);
}

TEST(PagePool, RefusesImpossibleSizes) {
  for (auto [bytes, pages] : std::vector<std::pair<size_t, int64_t>>{
           {0, 4},
           {64, 0},
           {64, -1},
           {64, int64_t{1} << 31},
           {std::numeric_limits<size_t>::max(), 2},
           {std::numeric_limits<size_t>::max() / 2, 3},
       }) {
    auto pool = PagePool::create(bytes, pages);
    ASSERT_FALSE(pool.ok()) << bytes << " " << pages;
    EXPECT_EQ(pool.error().code, Code::kInvalidArgument);
  }
}

TEST(PagePool, ReportsWhatTheSystemCannotMap) {
  // 2^30 pages of 2^20 bytes exceed the 47-bit user address space of every machine this runs on.
  auto pool = PagePool::create(size_t{1} << 20, int64_t{1} << 30);
  ASSERT_FALSE(pool.ok());
  EXPECT_EQ(pool.error().code, Code::kOutOfMemory);
}

TEST(PagePool, PagesAreDisjointAlignedAndWritable) {
  auto pool = make_pool(100, 5);
  EXPECT_EQ(pool->page_bytes(), 128u);
  ASSERT_TRUE(pool->reserve(5));
  std::vector<PageId> pages;
  for (int i = 0; i < 5; ++i) {
    pages.push_back(pool->take());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(pool->data(pages.back())) % 64, 0u);
    std::memset(pool->data(pages.back()), i + 1, pool->page_bytes());
  }
  EXPECT_EQ(std::set<PageId>(pages.begin(), pages.end()).size(), 5u);
  for (int i = 0; i < 5; ++i) {
    for (size_t b = 0; b < pool->page_bytes(); ++b) {
      ASSERT_EQ(std::to_integer<int>(pool->data(pages[i])[b]), i + 1);
    }
  }
}

TEST(PagePool, ReservationIsAllOrNothing) {
  auto pool = make_pool(64, 10);
  EXPECT_TRUE(pool->reserve(7));
  EXPECT_FALSE(pool->reserve(4));
  EXPECT_FALSE(pool->reserve(-1));
  EXPECT_EQ(pool->reserved(), 7);
  EXPECT_EQ(pool->available(), 3);
  const PageId page = pool->take();
  EXPECT_EQ(pool->reserved(), 6);
  EXPECT_EQ(pool->free_pages(), 9);
  EXPECT_EQ(pool->available(), 3);  // a take spends a promise, not what others may still ask for
  pool->unreserve(6);
  EXPECT_EQ(pool->available(), 9);
  pool->release(page);
  EXPECT_EQ(pool->available(), 10);
}

TEST(PagePool, ShuffleSeedChangesTheOrderAndNothingElse) {
  std::vector<std::vector<PageId>> orders;
  for (uint32_t seed : {0u, 1u, 2u, 1u}) {
    auto pool = make_pool(64, 64, seed);
    ASSERT_TRUE(pool->reserve(64));
    std::vector<PageId> order;
    for (int i = 0; i < 64; ++i) order.push_back(pool->take());
    EXPECT_EQ(std::set<PageId>(order.begin(), order.end()).size(), 64u);
    EXPECT_TRUE(pool->check_integrity(order));
    orders.push_back(order);
  }
  EXPECT_TRUE(std::is_sorted(orders[0].begin(), orders[0].end()));
  EXPECT_NE(orders[0], orders[1]);
  EXPECT_NE(orders[1], orders[2]);
  EXPECT_EQ(orders[1], orders[3]);
}

TEST(PagePool, IntegrityCheckFindsWhatItPromisesToFind) {
  auto pool = make_pool(64, 4);
  ASSERT_TRUE(pool->reserve(2));
  const PageId page = pool->take();
  EXPECT_TRUE(pool->check_integrity(std::vector<PageId>{page}));
  EXPECT_FALSE(pool->check_integrity({}));                               // taken, in no table
  EXPECT_FALSE(pool->check_integrity(std::vector<PageId>{page, page}));  // in two, counted once
  EXPECT_FALSE(pool->check_integrity(std::vector<PageId>{page, 3}));     // a free page in a table
  EXPECT_FALSE(pool->check_integrity(std::vector<PageId>{page, 4}));     // no such page
  EXPECT_FALSE(pool->check_integrity(std::vector<PageId>{page, -1}));
  pool->retain(page);
  EXPECT_FALSE(pool->check_integrity(std::vector<PageId>{page}));
  EXPECT_TRUE(pool->check_integrity(std::vector<PageId>{page, page}));
}

TEST(PageTable, ExhaustionChangesNothing) {
  auto pool = make_pool(64, 4);
  PageTable table(pool.get(), 8);
  ASSERT_TRUE(pool->reserve(2));
  EXPECT_EQ(table.append(12), 2);
  EXPECT_EQ(table.append(5), -1);  // needs a third page, none is promised
  EXPECT_EQ(table.length(), 12);
  EXPECT_EQ(table.ids().size(), 2u);
  EXPECT_EQ(table.append(4), 0);  // still fits the second page
  EXPECT_EQ(table.length(), 16);
  EXPECT_TRUE(pool->check_integrity(table.ids()));
}

TEST(PageTable, ForkCopiesOnlyThePartialPageAndOnlyOnce) {
  auto pool = make_pool(64, 8);
  ASSERT_TRUE(pool->reserve(8));
  PageTable parent(pool.get(), 4);
  ASSERT_EQ(parent.append(6), 2);
  std::memset(parent.pages()[1], 7, pool->page_bytes());
  PageTable child = parent.fork();
  EXPECT_EQ(pool->ref_count(parent.ids()[0]), 2);
  EXPECT_EQ(child.pages_to_append(1), 1);
  EXPECT_EQ(child.append(1), 1);
  EXPECT_EQ(child.ids()[0], parent.ids()[0]);
  EXPECT_NE(child.ids()[1], parent.ids()[1]);
  EXPECT_EQ(std::to_integer<int>(child.pages()[1][63]), 7);
  std::memset(child.pages()[1], 9, pool->page_bytes());
  EXPECT_EQ(std::to_integer<int>(parent.pages()[1][0]), 7);
  EXPECT_EQ(parent.append(1), 0);  // the parent is alone with its last page again
  PageTable full = parent.fork();
  EXPECT_EQ(full.append(1), 1);  // shared 7 of 8: copied
  EXPECT_EQ(full.append(1), 1);  // 9th token: a page of its own
}

TEST(PageTable, ForkOfAFullPageIsNeverCopied) {
  auto pool = make_pool(64, 4);
  ASSERT_TRUE(pool->reserve(4));
  PageTable parent(pool.get(), 4);
  ASSERT_EQ(parent.append(4), 1);
  PageTable child = parent.fork();
  EXPECT_EQ(child.append(1), 1);
  EXPECT_EQ(child.ids()[0], parent.ids()[0]);
}

TEST(PageTable, MovesLeaveNothingBehind) {
  auto pool = make_pool(64, 8);
  ASSERT_TRUE(pool->reserve(8));
  PageTable a(pool.get(), 4), b(pool.get(), 4);
  ASSERT_EQ(a.append(8), 2);
  ASSERT_EQ(b.append(4), 1);
  const std::vector<PageId> pages(a.ids().begin(), a.ids().end());
  b = std::move(a);
  EXPECT_EQ(a.length(),
            0);  // NOLINT(bugprone-use-after-move): the state after a move is the property tested
  EXPECT_TRUE(a.ids().empty());
  EXPECT_EQ(std::vector<PageId>(b.ids().begin(), b.ids().end()), pages);
  EXPECT_EQ(pool->free_pages(), 6);
  PageTable c(std::move(b));
  EXPECT_TRUE(pool->check_integrity(c.ids()));
}

// Model: every table is a plain list of bytes (one per token). The pool must show each table
// exactly its own bytes, whatever was forked, appended, moved or dropped before, in which page
// order ever.
class RandomisedTables : public ::testing::TestWithParam<uint32_t> {};

TEST_P(RandomisedTables, AgreeWithANaiveModelAfterEveryOperation) {
  constexpr int kTokens = 5, kPages = 40;
  constexpr size_t kBytes = 64;
  std::mt19937 random(GetParam());
  auto pool = make_pool(kBytes, kPages, GetParam() % 2 == 0 ? 0 : GetParam());
  struct Entry {
    PageTable table;
    std::vector<uint8_t> tokens;
  };
  std::vector<Entry> entries;
  int64_t promised = 0;
  auto uniform = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  int refused = 0, copies = 0;
  for (int step = 0; step < 3000; ++step) {
    const int op = uniform(10);
    if (op == 0 || entries.empty()) {
      entries.push_back({PageTable(pool.get(), kTokens), {}});
    } else if (op <= 5) {
      Entry& e = entries[uniform(static_cast<int>(entries.size()))];
      const int n = uniform(12);
      const int64_t want = e.table.pages_to_append(n);
      const bool fits = want <= pool->available();
      ASSERT_EQ(pool->reserve(want), fits);
      const bool shared = !e.tokens.empty() && e.tokens.size() % kTokens != 0 &&
                          pool->ref_count(e.table.ids().back()) > 1;
      if (fits) {
        ASSERT_EQ(e.table.append(n), want);
        copies += shared && n > 0;
        for (int i = 0; i < n; ++i) {
          const auto value = static_cast<uint8_t>(random());
          const size_t at = e.tokens.size();
          e.table.pages()[at / kTokens][at % kTokens] = std::byte{value};
          e.tokens.push_back(value);
        }
      } else if (promised < want) {
        const std::vector<PageId> before(e.table.ids().begin(), e.table.ids().end());
        ASSERT_EQ(e.table.append(n), -1);
        ASSERT_EQ(std::vector<PageId>(e.table.ids().begin(), e.table.ids().end()), before);
        ++refused;
      }
    } else if (op == 6) {
      const Entry& e = entries[uniform(static_cast<int>(entries.size()))];
      Entry fork{e.table.fork(), e.tokens};
      entries.push_back(std::move(fork));
    } else if (op == 7) {
      const int at = uniform(static_cast<int>(entries.size()));
      std::swap(entries[at], entries.back());
      entries.pop_back();
    } else if (op == 8) {
      const int n = uniform(4);
      if (pool->reserve(n)) promised += n;
    } else {
      pool->unreserve(promised);
      promised = 0;
    }

    std::vector<PageId> held;
    std::set<PageId> distinct;
    for (const Entry& e : entries) {
      ASSERT_EQ(e.table.length(), static_cast<int64_t>(e.tokens.size()));
      ASSERT_EQ(static_cast<int64_t>(e.table.ids().size()),
                PageTable::pages_for(e.table.length(), kTokens));
      for (size_t t = 0; t < e.tokens.size(); ++t) {
        ASSERT_EQ(std::to_integer<int>(e.table.pages()[t / kTokens][t % kTokens]), e.tokens[t]);
      }
      held.insert(held.end(), e.table.ids().begin(), e.table.ids().end());
      distinct.insert(e.table.ids().begin(), e.table.ids().end());
    }
    const Status status = pool->check_integrity(held);
    ASSERT_TRUE(status.ok()) << "step " << step << ": " << status.error().to_string();
    ASSERT_EQ(pool->free_pages(), kPages - static_cast<int64_t>(distinct.size()));
    ASSERT_EQ(pool->reserved(), promised);
    ASSERT_EQ(pool->available(), pool->free_pages() - promised);
  }
  EXPECT_GT(refused, 0);
  EXPECT_GT(copies, 0);
  entries.clear();
  EXPECT_EQ(pool->free_pages(), kPages);
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomisedTables, ::testing::Values(2u, 3u, 4u, 5u, 6u, 7u));

}  // namespace
}  // namespace fq::kv
