// How linears of few rows, whose weights are read once, are cut into steps that threads share, and
// what of the next call's weights each thread will read first. Lanes: of the kernel's vectors.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "src/core/thread_pool.h"
#include "src/ops/ops.h"

namespace fq::backend::cpu {

inline constexpr int64_t kStreamStep = 4;  // units of `lanes` columns, at most

struct StreamCut {
  // `least`: units of a step. Long rows take fewer: threads wait for the last step of a linear.
  StreamCut(int64_t tiles, int64_t tile_bytes, int64_t lanes, int64_t least) {
    constexpr int64_t kBytes = 32 << 10;
    const int64_t unit_bytes = tile_bytes * lanes / quant::kTileRows;
    units = tiles * quant::kTileRows / lanes;
    step = std::clamp<int64_t>(kBytes / std::max<int64_t>(unit_bytes, 1), least, kStreamStep);
    steps = (units + step - 1) / step;
  }
  StreamCut(const quant::LinearWeights& w, int64_t lanes, int64_t least)
      : StreamCut(w.tiles, w.bytes / w.tiles, lanes, least) {}

  int64_t units, step, steps;
};

struct BytesAhead {
  struct Part {
    const std::byte* begin = nullptr;
    int64_t bytes = 0;
  };
  Part parts[3];
  bool more = false;  // false: these are none, and none follow
};

// The n-th kilobyte of codes that `thread` of `threads` will read in a call of `next`, with the
// scales and zeros of a step where its codes begin.
inline BytesAhead bytes_ahead(const ops::LinearsAhead& next, int64_t lanes, int64_t least,
                              int thread, int threads, int64_t n) {
  constexpr int64_t kBytes = 1024;
  constexpr int64_t kMostBytes = 128 << 10;  // a quarter of a small second cache level
  const auto cut_of = [&](int64_t linear) {
    return StreamCut(next.linears[linear].tiles, next.bytes, lanes, least);
  };
  const StreamCut cut = cut_of(0);
  // Items of the call: steps of one linear after the other, or of all by turns.
  const int64_t turns = next.by_turns ? next.count : 1;
  int64_t items = cut.steps;
  for (int i = 1; i < next.count && turns == 1; ++i) items += cut_of(i).steps;
  const int64_t tiles = cut.step * lanes / quant::kTileRows, step_bytes = tiles * next.data_bytes;
  const int64_t parts = (step_bytes + kBytes - 1) / kBytes, place = n / parts, part = n % parts;
  int64_t step = ThreadPool::stream_begin(items, thread, threads) + place / turns;
  BytesAhead ahead;
  if (n * kBytes >= kMostBytes || step >= ThreadPool::stream_begin(items, thread + 1, threads))
    return ahead;
  int64_t linear = place % turns;
  for (; turns == 1 && step >= cut_of(linear).steps; ++linear) step -= cut_of(linear).steps;

  const ops::LinearsAhead::Weights& w = next.linears[linear];
  const int64_t tile = step * tiles;
  const auto bytes = [](const void* table, int64_t begin, int64_t count) {
    return BytesAhead::Part{static_cast<const std::byte*>(table) + begin, count};
  };
  const int64_t done = part * kBytes;
  ahead.more = true;
  ahead.parts[0] =
      bytes(w.data, tile * next.data_bytes + done, std::min(kBytes, step_bytes - done));
  if (part == 0) {
    ahead.parts[1] = bytes(w.scales, tile * next.scale_bytes, tiles * next.scale_bytes);
    ahead.parts[2] = bytes(w.shifts, tile * next.shift_bytes, tiles * next.shift_bytes);
  }
  return ahead;
}

}  // namespace fq::backend::cpu
