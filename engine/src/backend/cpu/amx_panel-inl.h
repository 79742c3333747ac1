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
#include <type_traits>

#include "hwy/highway.h"
#include "src/backend/cpu/amx-inl.h"
#include "src/backend/cpu/integer_panel-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
inline namespace FRAMEQUILT_DOT_NAMESPACE {
#if FRAMEQUILT_HAVE_AMX

static_assert(kIntegerColumns == kSumColumns);

// Inputs of a tile: whole tiles make a span, or all of a shorter one. Only the last span of a row
// may end within a tile; its weights are 0 there.
constexpr int64_t InputsOfTile(int64_t span) {
  return span <= 16 ? 16 : span <= 32 ? 32 : kTileBytes;
}

constexpr int64_t kAmxRows = 2 * kTileSide;  // of two tiles of inputs

// The int32 sums of a span on their way to float32. They are added up a few rows at a time, between
// the products of the next span, so that both kinds of arithmetic units have work.
template <int64_t kSumStride>
struct Totals {
  const int32_t* at = nullptr;     // [rows][kIntegerColumns]
  const float* numbers = nullptr;  // of the span
  const float* inputs = nullptr;   // of the rows, input_spans apart
  int64_t input_spans = 0;
  float* sums = nullptr;                      // [rows][kSumStride]
  decltype(hn::FirstN(DF(), size_t{})) kept;  // none of the old sums, or all
  SpanNumbers n[2];

  HWY_INLINE void Start() {
    Unrolled<2>([&](auto v) FRAMEQUILT_INLINE {
      n[v].scale = hn::Load(DF(), numbers + v * kLanes);
      n[v].shift = hn::Load(DF(), numbers + (2 + v) * kLanes);
    });
  }
  template <int kRows>
  HWY_INLINE void Add() {
    Unrolled<kRows>([&](auto) FRAMEQUILT_INLINE {
      Unrolled<2>([&](auto v) FRAMEQUILT_INLINE {
        float* const sum = sums + v * kLanes;
        const VF old = hn::MaskedLoad(kept, DF(), sum);
        hn::Store(AddSpan(old, hn::Load(DI(), at + v * kLanes), n[v], *inputs), DF(), sum);
      });
      at += kIntegerColumns;
      inputs += input_spans;
      sums += kSumStride;
    });
  }
};

// kHalves tiles of rows times one strip, whatever the last rows are. kRows: sums of rows that are
// added up after each product of two tiles.
template <int kHalves, int kRows, int64_t kSumStride>
HWY_NOINLINE void AmxStrip(const IntegerBlock& b) {
  alignas(64) int32_t totals[kHalves * kTileSide * kIntegerColumns];
  const int32_t* const totals_end = totals + kHalves * kTileSide * kIntegerColumns;
  const int64_t tile_inputs = b.tile_inputs;
  Totals<kSumStride> last;
  last.input_spans = b.input_spans;
  const auto products = [&](int64_t begin, const auto& between) FRAMEQUILT_INLINE {
    const int64_t inputs = 4 * std::min(b.span_steps, b.steps - begin);
    TileInputs in;
    in.first = b.x + 4 * begin;
    in.second = b.x + 4 * begin + kTileSide * b.x_stride;
    in.stride = b.x_stride;
    in.words = b.panel + begin * kIntegerColumns;
    in.word_stride = kIntegerColumns;
    in.tiles = (inputs + tile_inputs - 1) / tile_inputs;
    in.tile_inputs = tile_inputs;
    MultiplyTiles<kHalves, TileSigns{}>(in, between);
  };
  const auto start = [&](int64_t span) FRAMEQUILT_INLINE {
    last.at = totals;
    last.numbers = b.numbers + span * 2 * kIntegerColumns;
    last.inputs = b.input_sums + span;
    last.sums = b.sums;
    last.kept = hn::FirstN(DF(), b.first && span == 0 ? 0 : kLanes);
    last.Start();
  };
  const auto finish = [&]() FRAMEQUILT_INLINE {
    while (last.at < totals_end) last.template Add<kRows>();
  };
  products(0, []() FRAMEQUILT_INLINE {});
  StoreSums<kHalves>(totals);
  int64_t span = 1;
  for (int64_t begin = b.span_steps; begin < b.steps; begin += b.span_steps, ++span) {
    start(span - 1);
    products(begin, [&]() FRAMEQUILT_INLINE { last.template Add<kRows>(); });
    finish();
    StoreSums<kHalves>(totals);
  }
  start(span - 1);
  finish();
}

// The same for 1 to 32 rows. What lies behind them is read and written, up to whole tiles.
template <int64_t kSumStride>
HWY_INLINE void AmxStrips(const IntegerBlock& b, int64_t rows) {
  const int64_t tiles = (4 * b.span_steps + b.tile_inputs - 1) / b.tile_inputs;
  const auto run = [&]<int kRows>(std::integral_constant<int, kRows>) {
    rows > kTileSide ? AmxStrip<2, kRows, kSumStride>(b) : AmxStrip<1, kRows, kSumStride>(b);
  };
  if (tiles == 1) return run(std::integral_constant<int, 8>());
  if (tiles == 2) return run(std::integral_constant<int, 4>());
  run(std::integral_constant<int, 1>());
}

#endif
}  // namespace FRAMEQUILT_DOT_NAMESPACE
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
