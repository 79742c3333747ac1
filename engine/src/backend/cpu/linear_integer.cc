// Linears with quantized inputs: rows become 8-bit codes first, products are integers (exact), and
// each group's sum is scaled in float32 (ops/ops.h gives the order). Two regimes as in the float32
// linears: few rows stream the packed weights once (integer_stream-inl.h); many rows unpack panels
// of columns to bytes in cache and multiply them in register blocks (integer_panel-inl.h). Scratch
// is per thread and kept. Called by the engine thread, runs on the pool. Included as a whole by the
// files of the extensions of NEON and AVX2 (integer-inl.h).
#define FRAMEQUILT_WANT_VNNI 1
#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"
#include "src/backend/cpu/targets.h"
#include "src/core/aligned.h"
#include "src/quant/activations.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/linear_integer.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/amx_panel-inl.h"
#include "src/backend/cpu/integer_panel-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
inline namespace FRAMEQUILT_DOT_NAMESPACE {
#if FRAMEQUILT_HAVE_DOT

// --- Many rows: panels in cache --------------------------------------------------------------

constexpr int64_t kIntegerGroupColumns = 64;  // columns of one item of work
// A last vector that is alone gets a neighbour whose sums nobody reads.
constexpr int64_t kIntegerSumStride = kIntegerGroupColumns + kLanes;
// A panel is a row of strips of kIntegerColumns, as many as fit the first cache level beside the
// rows that they are multiplied with: those come from the second level, once for all strips.
constexpr int64_t kIntegerStrips = kManyRegisters && !FRAMEQUILT_HAVE_AMX ? 1 : 2;
constexpr int64_t kIntegerPanelColumns = kIntegerStrips * kIntegerColumns;
// Inputs of a panel, at most: whole spans. With more of them the micro kernel is called less often,
// as long as the panel fits the first cache level beside the rows: of 48 KiB 768 took 2 % off a
// vision tower (Zen 5), 1024 less.
constexpr int64_t kIntegerInputs =
    kIntegerStrips == 1 ? quant::kIntegerSpan * 3 / 2 : quant::kIntegerSpan;
inline int64_t MostIntegerInputs() {
  // Two times the rows: those of the next micro kernel come while this one's are read.
  constexpr int64_t kBytes = kIntegerInputs * (kIntegerColumns + 2 * kIntegerMicroRows);
  return first_cache_bytes() >= kBytes ? kIntegerInputs : quant::kIntegerSpan;
}
constexpr int64_t kStripWords = kIntegerInputs / 4 * 2 * kIntegerColumns;
constexpr int64_t kStripNumbers = kIntegerInputs / kHalfInputs * 2 * kIntegerColumns;
// Rows of a thread: matrix registers make unpacking a larger share, so threads share columns
// longer.
constexpr int64_t kIntegerLeastRowsOfThread = FRAMEQUILT_HAVE_AMX ? 1024 : kWorthUnpacking;
constexpr int64_t kIntegerRowBlock = kManyRegisters ? 512 : 256;  // rows of one item of work

struct IntegerScratch {
  AlignedBuffer<uint32_t> panel;      // [strips][steps, planes, vectors, lanes]
  AlignedBuffer<float> numbers;       // [strips][spans, 2, vectors, lanes]: scales, shifts
  AlignedBuffer<uint32_t> code_sums;  // [strips][spans, planes, vectors, lanes]
  AlignedBuffer<float> sums;          // [rows, columns]
};

inline IntegerScratch& ThreadIntegerScratch() {
  static thread_local IntegerScratch scratch;
  scratch.panel.reserve(kIntegerStrips * kStripWords);
  scratch.numbers.reserve(kIntegerStrips * kStripNumbers);
  if (!FRAMEQUILT_DIRECT_DOT) scratch.code_sums.reserve(kIntegerStrips * kStripNumbers);
  scratch.sums.reserve((kIntegerRowBlock + kSpareRows) * kIntegerSumStride);
  return scratch;
}

// One span: sums[row][vector] (`kFresh`: 0) plus its products, scaled.
template <int kPlanes, int kRows, bool kCentered, bool kFresh>
HWY_INLINE void AddSpanProducts(const IntegerBlock& b, int64_t span, int64_t begin,
                                const float* HWY_RESTRICT numbers,
                                const float* HWY_RESTRICT input_sums, float* HWY_RESTRICT sums) {
  constexpr int kVectors = kIntegerVectors;
  const DF df;
  VI totals[kRows * kVectors];
  SpanProducts<kPlanes, kRows, kCentered>(b, span, begin, std::min(begin + b.span_steps, b.steps),
                                          totals);
  SpanNumbers n[kVectors];
  Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
    n[v].scale = hn::Load(df, numbers + v * kLanes);
    n[v].shift = hn::Load(df, numbers + (kVectors + v) * kLanes);
  });
  const int64_t input_spans = b.input_spans;
  Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
    const VF inputs = hn::Set(df, input_sums[r * input_spans]);
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      float* const sum = sums + r * kIntegerSumStride + v * kLanes;
      const VF old = kFresh ? hn::Zero(df) : hn::Load(df, sum);
      hn::Store(AddSpan(old, totals[r * kVectors + v], n[v], inputs), df, sum);
    });
  });
}

template <int kPlanes, int kRows, bool kCentered>
HWY_NOINLINE void IntegerMicro(const IntegerBlock& b) {
  const float* numbers = b.numbers;
  int64_t span = 0, begin = 0;
  // Out of the loop: the compiler would look for every row whether it is the first span.
  if (b.first) {
    AddSpanProducts<kPlanes, kRows, kCentered, true>(b, 0, 0, numbers, b.input_sums, b.sums);
    span = 1, begin = b.span_steps;
  }
  for (; begin < b.steps; begin += b.span_steps, ++span) {
    AddSpanProducts<kPlanes, kRows, kCentered, false>(
        b, span, begin, numbers + span * 2 * kIntegerColumns, b.input_sums + span, b.sums);
  }
}

using IntegerMicroFn = void (*)(const IntegerBlock&);
// Kernels for kLeast.. rows: even cuts of more rows than are streamed are never smaller.
constexpr int kIntegerLeastRows = [] {
  int64_t least = kIntegerMicroRows;
  for (int64_t rows = kIntegerStreamRows + 1; rows <= kIntegerRowBlock; ++rows)
    least = std::min(least, rows / ((rows + kIntegerMicroRows - 1) / kIntegerMicroRows));
  return static_cast<int>(least);
}();
template <int kPlanes, bool kCentered, int... kI>
constexpr std::array<IntegerMicroFn, sizeof...(kI)> MakeIntegerMicros(
    std::integer_sequence<int, kI...>) {
  return {&IntegerMicro<kPlanes, kI + kIntegerLeastRows, kCentered>...};
}
template <int kPlanes, bool kCentered>
constexpr auto kIntegerMicros = MakeIntegerMicros<kPlanes, kCentered>(
    std::make_integer_sequence<int, kIntegerMicroRows - kIntegerLeastRows + 1>());

#if FRAMEQUILT_HAVE_AMX
static_assert(kIntegerColumns == kSumColumns);

struct IntegerTiles {
  using Block = IntegerBlock;
  using Numbers = SpanNumbers;
  static constexpr TileKind kTiles{};
  static HWY_INLINE Numbers LoadNumbers(const float* numbers) {
    return {hn::Load(DF(), numbers), hn::Load(DF(), numbers + kIntegerColumns)};
  }
  using RowInputs = VF;
  // Once for both vectors: the compiler would read it for each of them.
  static HWY_INLINE VF LoadInputs(const float* inputs) {
    VF v = hn::Set(DF(), *inputs);
    __asm__("" : "+v"(v.raw));
    return v;
  }
  static HWY_INLINE VF Add(VF old, const int32_t* sums, const Numbers& n, VF inputs) {
    return AddSpan(old, hn::Load(DI(), sums), n, inputs);
  }
};

#endif

// All `rows` of the first `strips` strips of a panel: before(begin, count) and after(begin, count)
// are called around the products of some rows.
template <int kPlanes, bool kCentered, class Before, class After>
void IntegerPanel(const IntegerBlock& b, int64_t rows, int64_t strips, const Before& before,
                  const After& after) {
#if FRAMEQUILT_HAVE_AMX
  static_assert(kPlanes == 1 && !kCentered);
  AmxPanel<IntegerTiles, kIntegerSumStride>(b, rows, strips, {kStripWords, kStripNumbers}, before,
                                            after);
#else
  // Not copied anew for every tile: by vectors, whose parts are not at hand when they are read.
  IntegerBlock part = b;
  ForTiles(rows, kIntegerMicroRows, [&](int64_t begin, int64_t count) FRAMEQUILT_INLINE {
    before(begin, count);
    part.x = b.x + begin * b.x_stride;
    part.input_sums = b.input_sums + begin * b.input_spans;
    part.periods = b.periods + begin * b.input_blocks;
    if (kCentered) part.minus_zeros = b.minus_zeros + begin;
    part.panel = b.panel;
    part.numbers = b.numbers;
    part.code_sums = b.code_sums;
    part.sums = b.sums + begin * kIntegerSumStride;
    for (int64_t strip = 0; strip < strips; ++strip) {
      kIntegerMicros<kPlanes, kCentered>[static_cast<size_t>(count - kIntegerLeastRows)](part);
      part.panel += kStripWords;
      part.numbers += kStripNumbers;
      if (kCentered) part.code_sums += kStripNumbers;
      part.sums += kIntegerColumns;
    }
    after(begin, count);
  });
#endif
}

#if !FRAMEQUILT_DIRECT_DOT
// IntegerBlock::code_sums of one vector of columns, whose codes of inputs [begin, end) are at
// `words`, in spans of at most kPairBlock inputs.
template <int kPlanes>
void SumCodes(const uint32_t* words, int64_t span, int64_t begin, int64_t end, uint32_t* to) {
  const VU ones = hn::Set(DU(), 0x01010101u);
  for (; begin < end; begin += span, to += kPlanes * kIntegerColumns) {
    VS sums[kPlanes];
    Unrolled<kPlanes>([&](auto p) FRAMEQUILT_INLINE { sums[p] = hn::Zero(DS()); });
    for (int64_t i = begin; i < std::min(begin + span, end); i += 4) {
      Unrolled<kPlanes>([&](auto p) FRAMEQUILT_INLINE {
        const VU codes = hn::Load(DU(), words + p * kIntegerColumns);
        sums[p] = hn::Add(sums[p], PairProducts(codes, ones));
      });
      words += kPlanes * kIntegerColumns;
    }
    Unrolled<kPlanes>([&](auto p) FRAMEQUILT_INLINE {
      hn::Store(hn::BitCast(DU(), sums[p]), DU(), to + p * kIntegerColumns);
    });
  }
}
#endif

// Codes of inputs [begin, end) x `unit` as bytes, and the numbers of their spans, as vector
// `vector` of a panel: of the strip that it is in.
template <int kBits, bool kCentered>
HWY_NOINLINE void UnpackUnit(const LinearWeights& w, int64_t span, int64_t unit, int64_t begin,
                             int64_t end, int64_t vector, IntegerScratch& scratch) {
  constexpr int kPlanes = kDotPlanes<kBits>;
  const int64_t tile_stride = w.padded_in() / 32 * SuperblockBytes(kBits);
  const auto* const data = static_cast<const std::byte*>(w.data);
  const int64_t strip = vector / kIntegerVectors, lane = vector % kIntegerVectors * kLanes;
  uint32_t* to = scratch.panel.data() + strip * kStripWords + lane;
  for (int64_t i = begin; i < end; i += kHalfInputs) {
    const std::byte* const superblock = data + i / 32 * SuperblockBytes(kBits);
    VU words[kHalfWords];
    LoadCodes<kBits>(superblock, static_cast<int>(i / kHalfInputs % 2), tile_stride, unit, words);
    Unrolled<kHalfWords>([&](auto j) FRAMEQUILT_INLINE {
      VU planes[kPlanes];
      CutPlanes<kBits>(words[j], planes);
      Unrolled<kPlanes>(
          [&](auto p) FRAMEQUILT_INLINE { hn::Store(planes[p], DU(), to + p * kIntegerColumns); });
      to += kPlanes * kIntegerColumns;
    });
  }
#if FRAMEQUILT_HAVE_AMX
  // The rest of the last tile: inputs that are multiplied with it are anything.
  const int64_t tile = BytesOfTile(span);
  for (int64_t i = end; i % tile != 0; i += 4, to += kIntegerColumns)
    hn::Store(hn::Zero(DU()), DU(), to);
#endif
#if !FRAMEQUILT_DIRECT_DOT
  if constexpr (kCentered) {
    SumCodes<kPlanes>(scratch.panel.data() + strip * kStripWords + lane, span, begin, end,
                      scratch.code_sums.data() + strip * kStripNumbers + lane);
  }
#endif
  float* number = scratch.numbers.data() + strip * kStripNumbers + lane;
  for (int64_t i = begin; i < std::min<int64_t>(end, w.in); i += span) {
    const SpanNumbers n = LoadSpan(w, unit, i / w.group);
    hn::Store(n.scale, DF(), number);
    hn::Store(n.shift, DF(), number + kIntegerColumns);
    number += 2 * kIntegerColumns;
  }
}

template <int kBits, bool kCentered>
void IntegerItem(const PanelPiece& item, const Inputs& inputs) {
  const LinearWeights& w = *item.args.w;
  IntegerScratch& scratch = ThreadIntegerScratch();
#if FRAMEQUILT_HAVE_AMX
  const Tiles tiles(BytesOfTile(inputs.span));
#endif
  const int64_t padded = (w.in + kHalfInputs - 1) / kHalfInputs * kHalfInputs;
  const auto strips = [&](int64_t column) {
    const int64_t columns = std::min(kIntegerPanelColumns, item.column_end - column);
    return (columns + kIntegerColumns - 1) / kIntegerColumns;
  };
#if FRAMEQUILT_HAVE_AMX
  const int64_t inputs_at_once = inputs.span > 256 ? kIntegerInputs : 256;
#else
  const int64_t inputs_at_once = EvenPanelInputs(padded, inputs.span, MostIntegerInputs());
#endif
  ForPanels(
      item, padded, inputs_at_once, kIntegerPanelColumns,
      [&](const LinearWeights& next, int64_t column, int64_t begin) {
        return AskFor(next, next.padded_in() / 32 * SuperblockBytes(kBits), SuperblockBytes(kBits),
                      column, kIntegerPanelColumns, begin,
                      std::min(begin + inputs_at_once, padded));
      },
      [&](int64_t begin, int64_t end, int64_t column) {
        for (int64_t v = 0; v < strips(column) * kIntegerVectors; ++v) {
          const int64_t unit = std::min(column / kLanes + v, item.column_end / kLanes - 1);
          UnpackUnit<kBits, kCentered>(w, inputs.span, unit, begin, end, v, scratch);
        }
      },
      [&](int64_t begin, int64_t end, int64_t column, const auto& before, const auto& after) {
        IntegerBlock b;
        b.x = inputs.codes + item.row_begin * inputs.stride + begin;
        b.x_stride = inputs.stride;
        b.input_spans = inputs.spans;
        b.input_sums = inputs.sums + item.row_begin * inputs.spans + begin / inputs.span;
        b.panel = scratch.panel.data();
        b.numbers = scratch.numbers.data();
        b.steps = (end - begin) / 4;
        b.span_steps = inputs.span / 4;
#if FRAMEQUILT_HAVE_AMX
        b.tile_bytes = BytesOfTile(inputs.span);
#endif
        b.input_blocks = inputs.blocks;
        b.span_blocks = (inputs.span + inputs.block - 1) / inputs.block;
        b.block_steps = inputs.block / 4;
        b.safe_steps = kDotPeriod<kBits>;
        b.periods = inputs.periods + item.row_begin * inputs.blocks + begin / inputs.block;
        if (kCentered) b.minus_zeros = inputs.minus_zeros + item.row_begin;
        b.code_sums = scratch.code_sums.data();
        b.first = begin == 0;
        b.sums = scratch.sums.data() + (column - item.column_begin);
        IntegerPanel<kDotPlanes<kBits>, kCentered>(b, item.row_end - item.row_begin, strips(column),
                                                   before, after);
      },
      [&](int64_t first, int64_t count, int64_t columns) {
        FinishScaledRows(item.args, inputs, item.row_begin + first, count, item.column_begin,
                         columns, scratch.sums.data() + first * kIntegerSumStride,
                         kIntegerSumStride);
      });
}

template <int kBits>
void IntegerPanels(const ops::LinearArgs& args, const Inputs& inputs, ThreadPool& pool) {
  PanelPieces(args, pool, kIntegerLeastRowsOfThread, kIntegerRowBlock, kIntegerGroupColumns,
              kIntegerColumns, 1, [&](const PanelPiece& piece) {
                constexpr bool kPairs = !FRAMEQUILT_DIRECT_DOT;
                if (kPairs && inputs.minus_zeros != nullptr) {
                  IntegerItem<kBits, kPairs>(piece, inputs);
                } else {
                  IntegerItem<kBits, false>(piece, inputs);
                }
              });
}

template <int kBits>
void RunInteger(const ops::LinearArgs& args, ThreadPool& pool) {
  if (args.rows == 0) return;
  const Inputs inputs = QuantizeInputs<kBits>(args, pool);
  if (args.rows <= kIntegerStreamRows) return IntegerStream<kBits>(args, inputs, pool);
  IntegerPanels<kBits>(args, inputs, pool);
}

#else  // targets without the dot product

template <int kBits>
void RunInteger(const ops::LinearArgs& args, ThreadPool& pool) {
  scalar_kernels().linear_integer[kBits](args, pool);
}

#endif

void IntegerW8(const ops::LinearArgs& args, ThreadPool& pool) { RunInteger<8>(args, pool); }
void IntegerW6(const ops::LinearArgs& args, ThreadPool& pool) { RunInteger<6>(args, pool); }
void IntegerW5(const ops::LinearArgs& args, ThreadPool& pool) { RunInteger<5>(args, pool); }
void IntegerW4(const ops::LinearArgs& args, ThreadPool& pool) { RunInteger<4>(args, pool); }
void IntegerW3(const ops::LinearArgs& args, ThreadPool& pool) { RunInteger<3>(args, pool); }
void IntegerW2(const ops::LinearArgs& args, ThreadPool& pool) { RunInteger<2>(args, pool); }

}  // namespace FRAMEQUILT_DOT_NAMESPACE
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fq::backend::cpu {

HWY_EXPORT(IntegerW8);
HWY_EXPORT(IntegerW6);
HWY_EXPORT(IntegerW5);
HWY_EXPORT(IntegerW4);
HWY_EXPORT(IntegerW3);
HWY_EXPORT(IntegerW2);

void FRAMEQUILT_DOT_NAMESPACE::fill_integer_linear_kernels(Kernels& kernels) {
  kernels.linear_integer[8] = &HWY_DYNAMIC_DISPATCH(IntegerW8);
  kernels.linear_integer[6] = &HWY_DYNAMIC_DISPATCH(IntegerW6);
  kernels.linear_integer[5] = &HWY_DYNAMIC_DISPATCH(IntegerW5);
  kernels.linear_integer[4] = &HWY_DYNAMIC_DISPATCH(IntegerW4);
  kernels.linear_integer[3] = &HWY_DYNAMIC_DISPATCH(IntegerW3);
  kernels.linear_integer[2] = &HWY_DYNAMIC_DISPATCH(IntegerW2);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
