// Pools of layers whose pages differ in size: the budget is kept, promises are all or nothing.
#include "src/kv/layer_pools.h"

#include <gtest/gtest.h>

namespace fq::kv {
namespace {

TEST(LayerPools, OneSizeTakesTheWholeBudget) {
  const std::vector<size_t> sizes(3, 128);
  const LayerPools::Plan plan = LayerPools::plan(sizes, 128 * 10 + 5, 100);
  EXPECT_EQ(plan.pages, std::vector<int64_t>{10});  // not a multiple of the layers: they share
  EXPECT_EQ(plan.pages_per_layer(), 3);
  EXPECT_EQ(plan.bytes_per_layer_page(), 3u * 128);
  EXPECT_EQ(LayerPools::plan(sizes, 1 << 20, 4).pages, std::vector<int64_t>{12});
}

TEST(LayerPools, TwoSizesShareTheBudgetByLayers) {
  const std::vector<size_t> sizes = {640, 128, 128, 128, 640};
  const LayerPools::Plan plan = LayerPools::plan(sizes, 10000, 100);
  EXPECT_EQ(plan.bytes_per_layer_page(), 2u * 640 + 3 * 128);
  const int64_t each = 10000 / (2 * 640 + 3 * 128);
  EXPECT_EQ(plan.pages, (std::vector<int64_t>{2 * each, 3 * each}));
  EXPECT_EQ(plan.pages_per_layer(), each);
  EXPECT_LE(plan.total_bytes(), 10000u);
  EXPECT_EQ(plan.total_pages(), 5 * each);

  auto pools = LayerPools::create(plan);
  ASSERT_TRUE(pools) << pools.error().to_string();
  EXPECT_EQ((*pools)->layers(), 5);
  EXPECT_EQ((*pools)->page_bytes(0), 640u);
  EXPECT_EQ((*pools)->page_bytes(2), 128u);
  EXPECT_EQ((*pools)->page_bytes(4), 640u);
  EXPECT_EQ(&(*pools)->pool(0), &(*pools)->pool(4));
  EXPECT_NE(&(*pools)->pool(0), &(*pools)->pool(1));
}

TEST(LayerPools, PromisesAreAllOrNothing) {
  const std::vector<size_t> sizes = {256, 64, 64};
  auto pools = *LayerPools::create(LayerPools::plan(sizes, 384 * 6, 100));
  EXPECT_TRUE(pools->reserve(4));
  EXPECT_EQ(pools->reserved(), 12);
  EXPECT_FALSE(pools->reserve(3));
  EXPECT_EQ(pools->reserved(), 12);
  // One pool alone has room again: still nothing.
  pools->unreserve(0, 4);
  EXPECT_FALSE(pools->reserve(3));
  EXPECT_EQ(pools->reserved(), 8);
  pools->unreserve(1, 4);
  pools->unreserve(2, 4);
  EXPECT_TRUE(pools->reserve(6));
  EXPECT_EQ(pools->free_pages(), pools->total());
}

TEST(LayerPools, IntegrityIsCheckedPerPool) {
  const std::vector<size_t> sizes = {256, 64, 64};
  auto pools = *LayerPools::create(LayerPools::plan(sizes, 384 * 6, 100));
  ASSERT_TRUE(pools->reserve(1));
  std::vector<std::vector<PageId>> ids(3);
  for (int layer = 0; layer < 3; ++layer)
    ids[static_cast<size_t>(layer)].push_back(pools->pool(layer).take());
  EXPECT_TRUE(pools->check_integrity(ids));
  EXPECT_EQ(pools->free_pages(), pools->total() - 3);
  std::swap(ids[0], ids[1]);  // same ids in the wrong pools
  ids[0].clear();
  EXPECT_FALSE(pools->check_integrity(ids));
}

}  // namespace
}  // namespace fq::kv
