// The inner products of integer linears of many rows, with the matrix registers of AMX: a strip of a
// panel of unpacked weights times 32 rows of inputs. Panels are those of the dot product
// (integer_panel-inl.h), whose words of 4 inputs are rows of a tile. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_AMX_PANEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_AMX_PANEL_INL_H_
#undef FRAMEQUILT_CPU_AMX_PANEL_INL_H_
#else
#define FRAMEQUILT_CPU_AMX_PANEL_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "src/backend/cpu/amx-inl.h"
#include "src/backend/cpu/integer_panel-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
inline namespace FRAMEQUILT_DOT_NAMESPACE {
#if FRAMEQUILT_HAVE_AMX

static_assert(kIntegerColumns == 2 * kTileSide);

// Inputs of a tile: whole tiles make a span, or all of a shorter one. Only the last span of a row
// may end within a tile; its weights are 0 there.
constexpr int64_t TileInputs(int64_t span) {
  return span <= 16 ? 16 : span <= 32 ? 32 : kTileBytes;
}

constexpr int64_t kAmxRows = 2 * kTileSide;  // of a tile of sums
constexpr int64_t kTotalsBytes = kIntegerColumns * 4;

// The products of the steps of one span: totals [rows][kIntegerColumns].
template <int kHalves>
HWY_INLINE void MultiplyTiles(const int8_t* x, int64_t x_stride, const uint32_t* words,
                              int64_t tiles, int64_t tile_inputs) {
  ZeroTile<0>();
  ZeroTile<1>();
  if constexpr (kHalves == 2) {
    ZeroTile<2>();
    ZeroTile<3>();
  }
  for (; tiles > 0; --tiles, x += tile_inputs, words += tile_inputs / 4 * kIntegerColumns) {
    LoadTile<6>(words, kTotalsBytes);
    LoadTile<4>(x, x_stride);
    AddTileProducts<0, 4, 6>();
    LoadTile<7>(words + kTileSide, kTotalsBytes);
    AddTileProducts<1, 4, 7>();
    if constexpr (kHalves == 2) {
      LoadTile<5>(x + kTileSide * x_stride, x_stride);
      AddTileProducts<2, 5, 6>();
      AddTileProducts<3, 5, 7>();
    }
  }
}

template <int kHalves>
HWY_INLINE void StoreTotals(int32_t* totals) {
  StoreTile<0>(totals, kTotalsBytes);
  StoreTile<1>(totals + kTileSide, kTotalsBytes);
  if constexpr (kHalves == 2) {
    totals += kTileSide * kIntegerColumns;
    StoreTile<2>(totals, kTotalsBytes);
    StoreTile<3>(totals + kTileSide, kTotalsBytes);
  }
}

// What is added to the sums of `rows` rows for a span.
template <bool kFirst>
HWY_INLINE void AddTotals(const int32_t* totals, int64_t rows, const float* numbers,
                          const float* inputs, int64_t input_spans, float* sums,
                          int64_t sum_stride) {
  const DF df;
  SpanNumbers n[2];
  Unrolled<2>([&](auto v) FRAMEQUILT_INLINE {
    n[v].scale = hn::Load(df, numbers + v * kLanes);
    n[v].shift = hn::Load(df, numbers + (2 + v) * kLanes);
  });
  for (; rows > 0; --rows) {
    Unrolled<2>([&](auto v) FRAMEQUILT_INLINE {
      float* const sum = sums + v * kLanes;
      const VF old = kFirst ? hn::Zero(df) : hn::Load(df, sum);
      hn::Store(AddSpan(old, hn::Load(DI(), totals + v * kLanes), n[v], *inputs), df, sum);
    });
    totals += kIntegerColumns;
    inputs += input_spans;
    sums += sum_stride;
  }
}

// Up to 32 rows of one strip. The sums of a span go through memory, and are added up while the next
// one is multiplied.
template <int kHalves>
HWY_NOINLINE void AmxStrip(const IntegerBlock& b, int64_t rows, int64_t sum_stride) {
  alignas(64) int32_t totals[2][kHalves * kTileSide * kIntegerColumns];
  const int64_t tile_inputs = b.tile_inputs;
  const float* inputs = b.input_sums;
  const float* numbers = b.numbers;
  const auto add = [&](int64_t span) FRAMEQUILT_INLINE {
    if (span == 0 && b.first) {
      AddTotals<true>(totals[span % 2], rows, numbers, inputs, b.input_spans, b.sums, sum_stride);
    } else {
      AddTotals<false>(totals[span % 2], rows, numbers, inputs, b.input_spans, b.sums, sum_stride);
    }
    numbers += 2 * kIntegerColumns;
    ++inputs;
  };
  int64_t span = 0;
  for (int64_t begin = 0; begin < b.steps; begin += b.span_steps, ++span) {
    const int64_t steps = std::min(b.span_steps, b.steps - begin);
    MultiplyTiles<kHalves>(b.x + 4 * begin, b.x_stride, b.panel + begin * kIntegerColumns,
                           (4 * steps + tile_inputs - 1) / tile_inputs, tile_inputs);
    if (span > 0) add(span - 1);
    StoreTotals<kHalves>(totals[span % 2]);
  }
  add(span - 1);
}

#endif
}  // namespace FRAMEQUILT_DOT_NAMESPACE
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
