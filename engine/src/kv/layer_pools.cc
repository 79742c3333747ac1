#include "src/kv/layer_pools.h"

#include <algorithm>
#include <numeric>

namespace fq::kv {

int64_t LayerPools::Plan::total_pages() const {
  return std::accumulate(pages.begin(), pages.end(), int64_t{0});
}

uint64_t LayerPools::Plan::total_bytes() const {
  uint64_t bytes = 0;
  for (size_t i = 0; i < pages.size(); ++i)
    bytes += static_cast<uint64_t>(pages[i]) * page_bytes[i];
  return bytes;
}

int64_t LayerPools::Plan::pages_per_layer() const {
  int64_t least = pages.front() / layers.front();
  for (size_t i = 0; i < pages.size(); ++i) least = std::min(least, pages[i] / layers[i]);
  return least;
}

uint64_t LayerPools::Plan::bytes_per_layer_page() const {
  uint64_t bytes = 0;
  for (size_t i = 0; i < pages.size(); ++i)
    bytes += static_cast<uint64_t>(layers[i]) * page_bytes[i];
  return bytes;
}

LayerPools::Plan LayerPools::plan(std::span<const size_t> page_bytes_of_layer, uint64_t budget,
                                  int64_t most_per_layer) {
  Plan plan;
  for (const size_t bytes : page_bytes_of_layer) {
    auto at = std::find(plan.page_bytes.begin(), plan.page_bytes.end(), bytes);
    const auto pool = at - plan.page_bytes.begin();
    if (at == plan.page_bytes.end()) {
      plan.page_bytes.push_back(bytes);
      plan.layers.push_back(0);
    }
    ++plan.layers[static_cast<size_t>(pool)];
    plan.pool_of_layer.push_back(static_cast<int>(pool));
  }
  plan.pages.assign(plan.layers.size(), 0);
  if (plan.pages.size() == 1) {
    plan.pages[0] = std::min(static_cast<int64_t>(budget / plan.page_bytes[0]),
                             most_per_layer * plan.layers[0]);
    return plan;
  }
  const int64_t each =
      std::min(static_cast<int64_t>(budget / plan.bytes_per_layer_page()), most_per_layer);
  for (size_t i = 0; i < plan.pages.size(); ++i) plan.pages[i] = each * plan.layers[i];
  return plan;
}

Result<std::unique_ptr<LayerPools>> LayerPools::create(Plan plan, uint32_t shuffle_seed) {
  std::unique_ptr<LayerPools> pools(new LayerPools(std::move(plan)));
  for (size_t i = 0; i < pools->plan_.pages.size(); ++i) {
    FQ_ASSIGN_OR_RETURN(auto pool, PagePool::create(pools->plan_.page_bytes[i],
                                                    pools->plan_.pages[i], shuffle_seed));
    pools->pools_.push_back(std::move(pool));
  }
  return pools;
}

PagePool& LayerPools::pool(int layer) const {
  return *pools_[static_cast<size_t>(plan_.pool_of_layer[static_cast<size_t>(layer)])];
}

bool LayerPools::reserve(int64_t pages) {
  for (size_t i = 0; i < pools_.size(); ++i) {
    if (pools_[i]->reserve(pages * plan_.layers[i])) continue;
    while (i-- > 0) pools_[i]->unreserve(pages * plan_.layers[i]);
    return false;
  }
  return true;
}

int64_t LayerPools::total() const { return plan_.total_pages(); }

int64_t LayerPools::free_pages() const {
  int64_t pages = 0;
  for (const auto& pool : pools_) pages += pool->free_pages();
  return pages;
}

int64_t LayerPools::reserved() const {
  int64_t pages = 0;
  for (const auto& pool : pools_) pages += pool->reserved();
  return pages;
}

Status LayerPools::check_integrity(std::span<const std::vector<PageId>> ids_of_layer) const {
  for (size_t i = 0; i < pools_.size(); ++i) {
    std::vector<PageId> ids;
    for (size_t layer = 0; layer < ids_of_layer.size(); ++layer) {
      if (plan_.pool_of_layer[layer] == static_cast<int>(i))
        ids.insert(ids.end(), ids_of_layer[layer].begin(), ids_of_layer[layer].end());
    }
    FQ_RETURN_IF_ERROR(pools_[i]->check_integrity(ids));
  }
  return {};
}

}  // namespace fq::kv
