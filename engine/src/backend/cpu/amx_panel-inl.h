// Linears of many rows with the matrix registers of AMX: a strip of a panel of unpacked weights
// times 32 rows of inputs, span by span. Panels are those of the other targets, whose words of 4
// bytes are rows of a tile. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_AMX_PANEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_AMX_PANEL_INL_H_
#undef FRAMEQUILT_CPU_AMX_PANEL_INL_H_
#else
#define FRAMEQUILT_CPU_AMX_PANEL_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "hwy/highway.h"
#include "src/backend/cpu/amx-inl.h"
#include "src/backend/cpu/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_AMX

// Bytes of a row of a tile: whole tiles make a span, or all of a shorter one. Only the last span of
// a row may end within a tile; its weights are 0 there.
constexpr int64_t BytesOfTile(int64_t span_bytes) {
  return span_bytes <= 16 ? 16 : span_bytes <= 32 ? 32 : kTileBytes;
}

// Calls run(begin, count) for whole tiles of rows, as one writes to the sums of all its rows.
template <class Run>
HWY_INLINE void ForTilesOfRows(int64_t rows, const Run& run) {
  for (int64_t begin = 0; begin < rows; begin += kAmxRows)
    run(begin, std::min(kAmxRows, rows - begin));
}

// A kind of product says what a strip is (Block), what is multiplied (kTiles), and how the sums of
// a span are added up: Numbers, LoadNumbers(block, span, vector) and Add(old, sums, numbers,
// inputs), where `inputs` is the sum of a row's inputs of the span, if the block has such sums.

// The sums of a span on their way to float32. They are added up a few rows at a time, between the
// products of the next span, so that both kinds of arithmetic units have work.
template <class Kind, int64_t kSumStride>
struct SpanSums {
  const int32_t* at = nullptr;                // [rows][kSumColumns]
  const float* inputs = nullptr;              // of the rows, input_spans apart
  float* sums = nullptr;                      // [rows][kSumStride]
  decltype(hn::FirstN(DF(), size_t{})) kept;  // none of the old sums, or all
  typename Kind::Numbers numbers[2];

  HWY_INLINE void Start(const typename Kind::Block& b, int64_t span, const int32_t* span_sums) {
    at = span_sums;
    inputs = b.input_sums != nullptr ? b.input_sums + span : nullptr;
    sums = b.sums;
    kept = hn::FirstN(DF(), b.first && span == 0 ? 0 : kLanes);
    Unrolled<2>([&](auto v) FRAMEQUILT_INLINE { numbers[v] = Kind::LoadNumbers(b, span, v); });
  }
  template <int kRows>
  HWY_INLINE void Add(int64_t input_spans) {
    Unrolled<kRows>([&](auto) FRAMEQUILT_INLINE {
      const auto of_row = Kind::LoadInputs(inputs);
      Unrolled<2>([&](auto v) FRAMEQUILT_INLINE {
        float* const sum = sums + v * kLanes;
        const VF old = hn::MaskedLoad(kept, DF(), sum);
        hn::Store(Kind::Add(old, at + v * kLanes, numbers[v], of_row), DF(), sum);
      });
      at += kSumColumns;
      inputs += input_spans;
      sums += kSumStride;
    });
  }
};

// kHalves tiles of rows times one strip, whatever the last rows are. kRows: sums of rows that are
// added up after each product of two tiles.
template <class Kind, int kHalves, int kRows, int64_t kSumStride>
HWY_NOINLINE void AmxStrip(const typename Kind::Block& b) {
  constexpr int64_t kWordInputs = 4 / sizeof(*b.x);
  alignas(64) int32_t sums[kHalves * kTileSide * kSumColumns];
  const int32_t* const sums_end = sums + kHalves * kTileSide * kSumColumns;
  const int64_t input_spans = b.input_spans;
  SpanSums<Kind, kSumStride> last;
  TileInputs in;
  in.stride = b.x_stride * static_cast<int64_t>(sizeof(*b.x));
  in.word_stride = kSumColumns;
  in.tile_bytes = b.tile_bytes;
  const auto products = [&](int64_t begin, const auto& between) FRAMEQUILT_INLINE {
    const int64_t bytes = 4 * std::min(b.span_steps, b.steps - begin);
    in.first = b.x + kWordInputs * begin;
    in.second = b.x + kWordInputs * begin + kTileSide * b.x_stride;
    in.words = b.panel + begin * kSumColumns;
    in.tiles = (bytes + in.tile_bytes - 1) / in.tile_bytes;
    MultiplyTiles<kHalves, Kind::kTiles>(in, between);
  };
  const auto finish = [&]() FRAMEQUILT_INLINE {
    while (last.at < sums_end) last.template Add<kRows>(input_spans);
  };
  products(0, []() FRAMEQUILT_INLINE {});
  StoreSums<kHalves>(sums);
  int64_t span = 1;
  for (int64_t begin = b.span_steps; begin < b.steps; begin += b.span_steps, ++span) {
    last.Start(b, span - 1, sums);
    products(begin, [&]() FRAMEQUILT_INLINE { last.template Add<kRows>(input_spans); });
    finish();
    StoreSums<kHalves>(sums);
  }
  last.Start(b, span - 1, sums);
  finish();
}

// The same for 1 to 32 rows. What lies behind them is read and written, up to whole tiles.
template <class Kind, int64_t kSumStride>
HWY_INLINE void AmxStrips(const typename Kind::Block& b, int64_t rows) {
  const int64_t tiles = (4 * b.span_steps + b.tile_bytes - 1) / b.tile_bytes;
  const auto run = [&]<int kRows>(std::integral_constant<int, kRows>) {
    rows > kTileSide ? AmxStrip<Kind, 2, kRows, kSumStride>(b)
                     : AmxStrip<Kind, 1, kRows, kSumStride>(b);
  };
  // All rows have their turn within a span, as evenly as may be.
  if (tiles == 1) return run(std::integral_constant<int, 8>());
  if (tiles == 2) return run(std::integral_constant<int, 4>());
  if (tiles <= 4) return run(std::integral_constant<int, 2>());
  run(std::integral_constant<int, 1>());
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
