// The page pools of a decoder: layers whose pages have the same size share one, so that rows which
// a reduction spares in one layer serve another. Knows bytes, not meaning. Engine thread only; made
// once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "src/kv/page_pool.h"

namespace fq::kv {

class LayerPools {
 public:
  // How a budget is cut into pages. One entry per layer, or per pool.
  struct Plan {
    std::vector<int> pool_of_layer;
    std::vector<size_t> page_bytes;  // per pool
    std::vector<int> layers;         // per pool
    std::vector<int64_t> pages;      // per pool

    int64_t total_pages() const;
    uint64_t total_bytes() const;
    // Pages that every layer can have at once.
    int64_t pages_per_layer() const;
    // Bytes of one page in every layer.
    uint64_t bytes_per_layer_page() const;
  };
  // At most `most_per_layer` pages for a layer. One pool takes the whole budget; several share it
  // so that every layer can have the same number of pages.
  static Plan plan(std::span<const size_t> page_bytes_of_layer, uint64_t budget,
                   int64_t most_per_layer);

  // Errors: invalid_argument, out_of_memory.
  static Result<std::unique_ptr<LayerPools>> create(Plan plan, uint32_t shuffle_seed = 0);

  int layers() const { return static_cast<int>(plan_.pool_of_layer.size()); }
  PagePool& pool(int layer) const;
  size_t page_bytes(int layer) const { return pool(layer).page_bytes(); }

  // Promises `pages` takes to every layer. Changes nothing and returns false when they are not
  // there.
  bool reserve(int64_t pages);
  void unreserve(int layer, int64_t pages) { pool(layer).unreserve(pages); }

  int64_t total() const;
  int64_t free_pages() const;
  int64_t reserved() const;
  // `ids_of_layer`: all page ids of all live tables of a layer.
  Status check_integrity(std::span<const std::vector<PageId>> ids_of_layer) const;

 private:
  explicit LayerPools(Plan plan) : plan_(std::move(plan)) {}

  Plan plan_;
  std::vector<std::unique_ptr<PagePool>> pools_;
};

}  // namespace fq::kv
