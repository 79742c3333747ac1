// Linears of many rows with the matrix registers of AMX: strips of a panel of unpacked weights
// times 16 rows of inputs, span by span. Panels are those of the other targets, whose words of 4
// bytes are rows of a tile. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_AMX_PANEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_AMX_PANEL_INL_H_
#undef FRAMEQUILT_CPU_AMX_PANEL_INL_H_
#else
#define FRAMEQUILT_CPU_AMX_PANEL_INL_H_
#endif

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>

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

// A kind of product says what a panel is (Block), what is multiplied (kTiles), and how the sums of
// a span are added up: Numbers, LoadNumbers(scales and shifts of a vector of columns), RowInputs,
// LoadInputs(the sum of a row's inputs, or nullptr) and Add(old, sums, numbers, inputs).

// The sums of kSpans spans on their way to float32: of 16 rows and one strip. They are added up a
// few rows at a time, between the products of the next ones, so that both kinds of arithmetic units
// have work; spans together, so that float sums are read and written once for them.
template <class Kind, int kSpans, int64_t kSumStride>
class SpanSums {
 public:
  static constexpr int64_t kCount = kSpans * kSums;

  explicit SpanSums(const typename Kind::Block& b) : input_spans_(b.input_spans) {}

  // numbers [kSpans][2][kSumColumns]; inputs [16][input_spans], or nullptr; `sums` are added to
  // those in `to` [16][kSumStride], unless they are the first.
  HWY_INLINE void Start(const int32_t* sums, const float* numbers, const float* inputs, float* to,
                        bool first) {
    at_ = sums;
    end_ = sums + kSums;
    inputs_ = inputs;
    to_ = to;
    kept_ = hn::FirstN(DF(), first ? 0 : kLanes);
    Unrolled<2 * kSpans>([&](auto i) FRAMEQUILT_INLINE {
      numbers_[i] = Kind::LoadNumbers(numbers + i / 2 * 2 * kSumColumns + i % 2 * kLanes);
    });
  }
  HWY_INLINE bool left() const { return at_ < end_; }
  template <int kRows>
  HWY_INLINE void Add() {
    Unrolled<kRows>([&](auto) FRAMEQUILT_INLINE {
      typename Kind::RowInputs of_row[kSpans];
      Unrolled<kSpans>([&](auto s) FRAMEQUILT_INLINE {
        of_row[s] = Kind::LoadInputs(inputs_ != nullptr ? inputs_ + s : nullptr);
      });
      Unrolled<2>([&](auto v) FRAMEQUILT_INLINE {
        float* const at = to_ + v * kLanes;
        VF sum = hn::MaskedLoad(kept_, DF(), at);
        Unrolled<kSpans>([&](auto s) FRAMEQUILT_INLINE {
          sum = Kind::Add(sum, at_ + s * kSums + v * kLanes, numbers_[2 * s + v], of_row[s]);
        });
        hn::Store(sum, DF(), at);
      });
      at_ += kSumColumns;
      if (inputs_ != nullptr) inputs_ += input_spans_;
      to_ += kSumStride;
    });
  }
  HWY_INLINE void AddRest() {
    while (left()) Add<1>();
  }

 private:
  const int64_t input_spans_;
  const int32_t *at_ = nullptr, *end_ = nullptr;  // [kSpans][16][kSumColumns]
  const float* inputs_ = nullptr;
  float* to_ = nullptr;
  decltype(hn::FirstN(DF(), size_t{})) kept_;  // none of the old sums, or all
  typename Kind::Numbers numbers_[2 * kSpans];
};

// Where the next strip of a panel lies.
struct StripStride {
  int64_t words = 0, numbers = 0;
};

// All rows times the strips of a panel, 16 at a time, kSpans spans of kTiles tiles at once, or of
// any number where that is 0. What lies behind the last row is read and written, up to whole tiles.
template <class Kind, int kSpans, int kTiles, int64_t kSumStride, class Before, class After>
HWY_NOINLINE void MultiplyPanel(const typename Kind::Block& b, int64_t rows, int64_t strips,
                                StripStride stride, const Before& before, const After& after) {
  using Sums = SpanSums<Kind, kSpans, kSumStride>;
  constexpr int64_t kWordInputs = 4 / sizeof(*b.x);
  // So many of the 16 rows have their turn after each product of two tiles, a part of all of them.
  constexpr int kTurns = kTiles > 0 ? 2 * kSpans * kTiles : 8;
  constexpr int kRows = std::bit_floor(16u / kTurns);
  constexpr bool kAllAdded = kTiles > 0 && kTurns * kRows == 16;
  static_assert(16 % kRows == 0);
  alignas(64) int32_t sums[2][Sums::kCount];
  Sums last(b);
  TileOperands in;
  in.stride = b.x_stride * static_cast<int64_t>(sizeof(*b.x));
  in.word_stride = kSumColumns;
  in.tile_bytes = b.tile_bytes;
  const int64_t steps = b.steps, span_steps = b.span_steps;
  bool some_left = false;
  int next = 0;
  int64_t finished = 0;
  const auto finish = [&](int64_t begin) FRAMEQUILT_INLINE {
    after(finished, begin - finished);
    finished = begin;
  };
  for (int64_t begin = 0; begin < rows; begin += kTileSide) {
    before(begin, std::min(kTileSide, rows - begin));
    const auto* const x = b.x + begin * b.x_stride;
    for (int64_t strip = 0; strip < strips; ++strip) {
      const uint32_t* const words = b.panel + strip * stride.words;
      const float* numbers = b.numbers + strip * stride.numbers;
      const float* inputs =
          b.input_sums != nullptr ? b.input_sums + begin * b.input_spans : nullptr;
      float* const to = b.sums + begin * kSumStride + strip * kSumColumns;
      for (int64_t step = 0; step < steps; step += kSpans * span_steps) {
        int32_t* const products = sums[next];
        next ^= 1;
        Unrolled<kSpans>([&](auto s) FRAMEQUILT_INLINE {
          const int64_t at = step + s * span_steps;
          in.inputs = x + kWordInputs * at;
          in.words = words + at * kSumColumns;
          in.tiles = (4 * std::min(span_steps, steps - at) + in.tile_bytes - 1) / in.tile_bytes;
          MultiplyTiles<Kind::kTiles, kTiles>(in, products + s * kSums, [&]() FRAMEQUILT_INLINE {
            if (kAllAdded ? some_left : last.left()) last.template Add<kRows>();
          });
        });
        if constexpr (!kAllAdded) last.AddRest();
        // The last sums of the rows before these have just been added up.
        if (strip == 0 && step == 0 && begin > 0) finish(begin);
        last.Start(products, numbers, inputs, to, b.first && step == 0);
        some_left = true;
        numbers += kSpans * 2 * kSumColumns;
        if (inputs != nullptr) inputs += kSpans;
      }
    }
  }
  last.AddRest();
  finish(rows);
}

// The same for any panel, whose spans are alike but for the last one.
template <class Kind, int64_t kSumStride, class Before, class After>
void AmxPanel(const typename Kind::Block& b, int64_t rows, int64_t strips, StripStride stride,
              const Before& before, const After& after) {
  const int64_t spans = (b.steps + b.span_steps - 1) / b.span_steps;
  const auto tiles_of = [&](int64_t steps) {
    return (4 * steps + b.tile_bytes - 1) / b.tile_bytes;
  };
  const int64_t tiles = tiles_of(b.span_steps);
  const int64_t tiles_of_last = tiles_of(b.steps - (spans - 1) * b.span_steps);
  const auto run = [&]<int kSpans, int kTiles>(std::integer_sequence<int, kSpans, kTiles>) {
    MultiplyPanel<Kind, kSpans, kTiles, kSumStride>(b, rows, strips, stride, before, after);
  };
  if (tiles > 2 || tiles != tiles_of_last) return run(std::integer_sequence<int, 1, 0>());
  const auto run_spans = [&]<int kTiles>(std::integral_constant<int, kTiles>) {
    if (spans % 2 == 0) return run(std::integer_sequence<int, 2, kTiles>());
    if (spans == 3) return run(std::integer_sequence<int, 3, kTiles>());
    run(std::integer_sequence<int, 1, kTiles>());
  };
  if (tiles == 1) return run_spans(std::integral_constant<int, 1>());
  run_spans(std::integral_constant<int, 2>());
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
