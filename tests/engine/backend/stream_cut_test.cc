// What threads ask memory for while they wait is what they read next: against a plain enumeration
// of the items of a call and of the bytes that belong to each.
#include "src/backend/cpu/stream_cut.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "src/quant/affine_weights.h"

namespace fq::backend::cpu {
namespace {

using model::WeightFormat;
using quant::kTileRows;
using Bytes = std::vector<const std::byte*>;  // every one

struct Case {
  WeightFormat format;
  int in;
  std::vector<int> outs;
  bool by_turns;
};

quant::PackedLinear packed(const WeightFormat& format, int out, int in) {
  const std::vector<float> weights(static_cast<size_t>(out) * static_cast<size_t>(in), 0.5f);
  return std::move(
      *quant::pack_linear(weights.data(), out, in, format, quant::AffineRange::kIncludeZero));
}

void append(Bytes* to, const void* table, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) to->push_back(static_cast<const std::byte*>(table) + i);
}

class StreamAhead : public testing::TestWithParam<Case> {};

TEST_P(StreamAhead, AsksForWhatEachThreadReadsFirst) {
  const Case& c = GetParam();
  std::vector<quant::PackedLinear> linears;
  ops::LinearsAhead next;
  next.by_turns = c.by_turns;
  for (const int out : c.outs) linears.push_back(packed(c.format, out, c.in));
  for (const quant::PackedLinear& linear : linears) next.add(linear.view);

  for (const int64_t lanes : {4, 8, 16}) {
    for (const int64_t least : {int64_t{1}, kStreamStep}) {
      if (lanes * least < kTileRows) continue;  // no kernel takes half a tile
      // Items of the call in order: a linear and its first unit.
      const int64_t step = StreamCut(linears[0].view, lanes, least).step;
      std::vector<std::vector<std::pair<size_t, int64_t>>> items;
      for (size_t i = 0; i < linears.size(); ++i) {
        const int64_t units = linears[i].view.tiles * kTileRows / lanes;
        for (int64_t unit = 0; unit < units; unit += step) {
          if (i == 0 || !c.by_turns) items.emplace_back();
          items[c.by_turns ? static_cast<size_t>(unit / step) : items.size() - 1].push_back(
              {i, unit});
        }
      }
      for (const int threads : {1, 2, 3, 7}) {
        for (int thread = 0; thread < threads; ++thread) {
          SCOPED_TRACE(testing::Message() << "lanes " << lanes << " least " << least << " thread "
                                          << thread << " of " << threads);
          const auto count = static_cast<int64_t>(items.size());
          Bytes codes, scales, shifts;
          for (int64_t n = count * thread / threads; n < count * (thread + 1) / threads; ++n) {
            for (const auto& [i, unit] : items[static_cast<size_t>(n)]) {
              const quant::LinearWeights& w = linears[i].view;
              const int64_t begin = unit * lanes / kTileRows;
              const int64_t end = begin + step * lanes / kTileRows;
              const auto table = [&](Bytes* to, const void* first, int64_t tile_bytes) {
                append(to, first, begin * tile_bytes, end * tile_bytes);
              };
              const int64_t numbers = int64_t{w.groups} * kTileRows;
              const int64_t scale = w.format.scale == DType::kF32 ? 4 : 2;
              table(&codes, w.data, w.data_bytes / w.tiles);
              if (w.scales != nullptr) table(&scales, w.scales, numbers * scale);
              if (w.zeros != nullptr) table(&shifts, w.zeros, numbers);
              if (w.offsets != nullptr) table(&shifts, w.offsets, numbers * scale);
            }
          }
          Bytes asked, asked_scales, asked_shifts;
          int64_t n = 0;
          while (true) {
            const BytesAhead ahead = bytes_ahead(next, lanes, least, thread, threads, n++);
            if (!ahead.more) break;
            ASSERT_LE(ahead.parts[0].bytes, 1024);
            append(&asked, ahead.parts[0].begin, 0, ahead.parts[0].bytes);
            append(&asked_scales, ahead.parts[1].begin, 0, ahead.parts[1].bytes);
            append(&asked_shifts, ahead.parts[2].begin, 0, ahead.parts[2].bytes);
          }
          // Up to 128 KiB of codes, the last kilobyte of a step may be a short one.
          if (codes.size() > size_t{100} << 10) {
            EXPECT_GT(asked.size(), size_t{100} << 10);
            EXPECT_LE(asked.size(), size_t{128} << 10);
            ASSERT_LE(asked.size(), codes.size());
            codes.resize(asked.size());
            ASSERT_LE(asked_scales.size(), scales.size());
            scales.resize(asked_scales.size());
            ASSERT_LE(asked_shifts.size(), shifts.size());
            shifts.resize(asked_shifts.size());
          }
          EXPECT_TRUE(asked == codes);
          EXPECT_TRUE(asked_scales == scales);
          EXPECT_TRUE(asked_shifts == shifts);
        }
      }
    }
  }
}

using Kind = WeightFormat::Kind;
constexpr WeightFormat kW4{.kind = Kind::kAffine, .bits = 4, .group = 128, .symmetric = true};
constexpr WeightFormat kW3{.kind = Kind::kAffine, .bits = 3, .group = 32};
constexpr WeightFormat kOffset{.kind = Kind::kAffine, .bits = 8, .group = 64, .offset = true};
INSTANTIATE_TEST_SUITE_P(
    Calls, StreamAhead,
    testing::Values(Case{kW4, 896, {896}, false}, Case{kW4, 896, {896, 128, 128}, false},
                    Case{kW4, 896, {1000, 1000}, true}, Case{kW3, 576, {576, 192, 192}, false},
                    Case{kW3, 576, {1536, 1536}, true}, Case{kOffset, 300, {17, 150, 24}, false},
                    Case{kOffset, 300, {77, 77}, true},
                    Case{{.kind = Kind::kF32}, 64, {500}, false},
                    Case{{.kind = Kind::kBF16}, 65, {48, 16}, false}));

}  // namespace
}  // namespace fq::backend::cpu
