// Linears of many rows with quantized inputs and weights of few bits by Winograd's inner product
// (winograd-inl.h), for processors with AVX-512 VNNI that add beside multiplying: the same bits as
// those of linear_integer.cc, in three quarters of the multiplications. Panels of columns are
// unpacked to bytes in cache and multiplied in register blocks as there. Few rows, and groups that
// are too short to gain, are left to the linears that these take the place of. Scratch is per
// thread and kept. Called by the engine thread, runs on the pool.
#define FRAMEQUILT_WANT_VNNI 1
#define FRAMEQUILT_FOLD 1
#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <utility>

#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"
#include "src/backend/cpu/targets.h"
#include "src/core/aligned.h"
#include "src/quant/activations.h"

#ifndef FRAMEQUILT_REPLACED_LINEARS
#define FRAMEQUILT_REPLACED_LINEARS
namespace fq::backend::cpu {
namespace {
// By bits, as the first call says.
const std::array<LinearFn, 9>& replaced_linears(const std::array<LinearFn, 9>& linears) {
  static const std::array<LinearFn, 9> first = linears;
  return first;
}
}  // namespace
}  // namespace fq::backend::cpu
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/linear_winograd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/integer_stream-inl.h"
#include "src/backend/cpu/winograd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
inline namespace winograd {  // other linears have functions of these names
#if FRAMEQUILT_HAVE_DOT && HWY_TARGET == HWY_AVX3_DL

constexpr int kVectors = 4;
constexpr int64_t kColumns = kVectors * kLanes;  // of a panel, and of one item of work
constexpr int64_t kSumStride = kColumns + kLanes;
constexpr int64_t kRowBlock = 512;  // rows of one item of work
// Inputs of a panel, at most: whole spans, which fit the first cache level beside two times the
// rows, those of the next micro kernel too.
constexpr int64_t kPanelInputs = quant::kIntegerSpan;
inline int64_t MostPanelInputs() {
  constexpr int64_t kBytes = kPanelInputs * (kColumns + 2 * kMicroRows);
  return first_cache_bytes() >= kBytes ? kPanelInputs : kPanelInputs * 3 / 4;
}

struct Scratch {
  AlignedBuffer<uint32_t> panel;   // [steps, vectors, lanes]
  AlignedBuffer<float> numbers;    // [spans, 2, vectors, lanes]: scales, shifts
  AlignedBuffer<uint32_t> starts;  // [spans, kMostBases, vectors, lanes]
  AlignedBuffer<float> sums;       // [rows, kSumStride]
};

inline Scratch& ThreadScratch() {
  static thread_local Scratch scratch;
  constexpr int64_t kSpans = kPanelInputs / kLeastSpan;
  scratch.panel.reserve(kPanelInputs / 4 * kColumns);
  scratch.numbers.reserve(kSpans * 2 * kColumns);
  scratch.starts.reserve(kSpans * kMostBases * kColumns);
  scratch.sums.reserve((kRowBlock + kMicroRows) * kSumStride);
  return scratch;
}

// Of FoldedRows; the engine thread's, the pool's threads write to it.
struct RowScratch {
  AlignedBuffer<int8_t> codes, rest;
  AlignedBuffer<FoldedSpan> spans;
};

// A panel times the same inputs of some rows, added to sums.
struct Block {
  const int8_t* x = nullptr;          // [periods, kMicroRows, kPeriod]
  const FoldedSpan* spans = nullptr;  // [spans, kMicroRows]
  const int8_t* rest = nullptr;       // [rows, rest_stride]
  int64_t rest_stride = 0;
  const uint32_t *panel = nullptr, *starts = nullptr;
  const float* numbers = nullptr;
  int64_t steps = 0, span_steps = 0;
  float* sums = nullptr;  // [rows, kSumStride]
  bool first = false;     // start from 0 instead of from sums
};

// Adds the products of what is left of codes beyond their window, in the span that begins at step
// `begin`, to totals[row][vector].
template <int kRows>
HWY_INLINE void AddRest(const Block& b, int64_t begin, const FoldedSpan* HWY_RESTRICT spans,
                        VI* totals) {
  Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
    for (uint32_t left = spans[r].beyond; left != 0; left &= left - 1) {
      const int64_t step = begin + std::countr_zero(left) * kPeriod / 4;
      const int8_t* const rest = b.rest + r * b.rest_stride + 4 * step;
      const VU first = FourInputs(rest), second = FourInputs(rest + 4);
      const uint32_t* const words = b.panel + step * kColumns;
      Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
        VI& total = totals[r * kVectors + v];
        total = DirectDot(total, hn::Load(DU(), words + v * kLanes), first);
        total = DirectDot(total, hn::Load(DU(), words + kColumns + v * kLanes), second);
      });
    }
  });
}

// totals[row][vector]: what the sums of a span start with.
template <int kRows>
HWY_INLINE void StartSpan(const FoldedSpan* HWY_RESTRICT spans, const uint32_t* HWY_RESTRICT starts,
                          VI* totals) {
  Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
    const VI of_row = hn::Set(DI(), spans[r].start);
    const uint32_t* const of_base = starts + spans[r].base * kColumns;
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      const VI of_columns = hn::BitCast(DI(), hn::Load(DU(), of_base + v * kLanes));
      totals[r * kVectors + v] = hn::Add(of_row, of_columns);
    });
  });
}

// Two words of each row times those of all columns.
template <int kRows, bool kFolded>
HWY_INLINE void AddPair(const int8_t* HWY_RESTRICT x, const uint32_t* HWY_RESTRICT words,
                        VI* totals) {
  VU first[kVectors], second[kVectors];
  Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
    first[v] = hn::Load(DU(), words + v * kLanes);
    second[v] = hn::Load(DU(), words + kColumns + v * kLanes);
  });
  Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
    const int8_t* const inputs = x + r * kPeriod;
    VI* const of_row = totals + r * kVectors;
    if constexpr (kFolded) {
      AddFolded(inputs, first, second, of_row);
    } else {
      const VU one = FourInputs(inputs), other = FourInputs(inputs + 4);
      Unrolled<kVectors>(
          [&](auto v) FRAMEQUILT_INLINE { of_row[v] = DirectDot(of_row[v], first[v], one); });
      Unrolled<kVectors>(
          [&](auto v) FRAMEQUILT_INLINE { of_row[v] = DirectDot(of_row[v], second[v], other); });
    }
  });
}

// The span that begins at step `begin`: sums[row][vector] (`kFresh`: 0) plus its products, scaled.
template <int kRows, bool kFresh>
HWY_INLINE void AddSpanProducts(const Block& b, int64_t begin, const FoldedSpan* HWY_RESTRICT spans,
                                const uint32_t* HWY_RESTRICT starts,
                                const float* HWY_RESTRICT numbers) {
  const DF df;
  VI totals[kRows * kVectors];
  uint32_t beyond = 0;
  Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE { beyond |= spans[r].beyond; });
  StartSpan<kRows>(spans, starts, totals);
  if (beyond != 0) [[unlikely]]
    AddRest<kRows>(b, begin, spans, totals);
  const uint32_t* HWY_RESTRICT words = b.panel + begin * kColumns;
  const int8_t* HWY_RESTRICT x = b.x + 4 * begin * kMicroRows;
  const int8_t* const x_end = b.x + 4 * std::min(begin + b.span_steps, b.steps) * kMicroRows;
  for (; x < x_end; x += kPeriodBytes, words += kPeriod / 4 * kColumns) {
    AddPair<kRows, true>(x, words, totals);
    AddPair<kRows, false>(x + kPairInputs, words + kPairInputs / 4 * kColumns, totals);
  }
  float* HWY_RESTRICT sums = b.sums;
  // Two vectors of columns at a time: the numbers of four would not stay in registers.
  Unrolled<kVectors / 2>([&](auto half) FRAMEQUILT_INLINE {
    SpanNumbers n[2];
    Unrolled<2>([&](auto i) FRAMEQUILT_INLINE {
      n[i].scale = hn::Load(df, numbers + (2 * half + i) * kLanes);
      n[i].shift = hn::Load(df, numbers + (kVectors + 2 * half + i) * kLanes);
    });
    Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
      const VF inputs = hn::Set(df, spans[r].sum);
      Unrolled<2>([&](auto i) FRAMEQUILT_INLINE {
        constexpr int kVector = 2 * half + i;
        float* const sum = sums + r * kSumStride + kVector * kLanes;
        const VF old = kFresh ? hn::Zero(df) : hn::Load(df, sum);
        hn::Store(AddSpan(old, totals[r * kVectors + kVector], n[i], inputs), df, sum);
      });
    });
  });
}

template <int kRows>
HWY_NOINLINE void Micro(const Block& b) {
  const FoldedSpan* spans = b.spans;
  const uint32_t* starts = b.starts;
  const float* numbers = b.numbers;
  int64_t begin = 0;
  const auto next = [&]() FRAMEQUILT_INLINE {
    begin += b.span_steps;
    spans += kMicroRows;
    starts += kMostBases * kColumns;
    numbers += 2 * kColumns;
  };
  // Out of the loop: the compiler would look for every row whether it is the first span.
  if (b.first) {
    AddSpanProducts<kRows, true>(b, begin, spans, starts, numbers);
    next();
  }
  for (; begin < b.steps; next()) AddSpanProducts<kRows, false>(b, begin, spans, starts, numbers);
}

using MicroFn = void (*)(const Block&);
template <int... kI>
constexpr std::array<MicroFn, sizeof...(kI)> MakeMicros(std::integer_sequence<int, kI...>) {
  return {&Micro<kI + 1>...};
}
constexpr auto kMicros = MakeMicros(std::make_integer_sequence<int, kMicroRows>());

// Codes of inputs [begin, end) x `unit` as bytes, and the numbers of their spans, as vector
// `vector` of the panel.
template <int kBits>
HWY_NOINLINE void Unpack(const LinearWeights& w, int64_t span, int64_t unit, int64_t begin,
                         int64_t end, int64_t vector, Scratch& scratch) {
  const int64_t tile_stride = w.padded_in() / 32 * SuperblockBytes(kBits), lane = vector * kLanes;
  const auto* const data = static_cast<const std::byte*>(w.data);
  uint32_t* to = scratch.panel.data() + lane;
  for (int64_t i = begin; i < end; i += kHalfInputs, to += kHalfWords * kColumns) {
    const std::byte* const superblock = data + i / 32 * SuperblockBytes(kBits);
    VU words[kHalfWords];
    LoadCodes<kBits>(superblock, static_cast<int>(i / kHalfInputs % 2), tile_stride, unit, words);
    Unrolled<kHalfWords>([&](auto j)
                             FRAMEQUILT_INLINE { hn::Store(words[j], DU(), to + j * kColumns); });
  }
  const uint32_t* words = scratch.panel.data() + lane;
  uint32_t* starts = scratch.starts.data() + lane;
  float* number = scratch.numbers.data() + lane;
  for (int64_t i = begin; i < std::min<int64_t>(end, w.in); i += span) {
    ColumnStarts<kBits>(words, kColumns, std::min(span, end - i), starts);
    const SpanNumbers n = LoadSpan(w, unit, i / w.group);
    hn::Store(n.scale, DF(), number);
    hn::Store(n.shift, DF(), number + kColumns);
    words += span / 4 * kColumns;
    starts += kMostBases * kColumns;
    number += 2 * kColumns;
  }
}

template <int kBits>
void Item(const PanelPiece& item, const Inputs& inputs, const FoldedRows& rows) {
  const LinearWeights& w = *item.args.w;
  Scratch& scratch = ThreadScratch();
  const int64_t padded = (w.in + kHalfInputs - 1) / kHalfInputs * kHalfInputs;
  const int64_t inputs_at_once = rows.panel;
  ForPanels(
      item, padded, inputs_at_once, kColumns,
      [&](const LinearWeights& next, int64_t column, int64_t begin) {
        return AskFor(next, next.padded_in() / 32 * SuperblockBytes(kBits), SuperblockBytes(kBits),
                      column, kColumns, begin, std::min(begin + inputs_at_once, padded));
      },
      [&](int64_t begin, int64_t end, int64_t column) {
        for (int64_t v = 0; v < kVectors; ++v) {
          // Vectors behind the last column repeat it; nobody reads their sums.
          const int64_t unit = std::min(column / kLanes + v, item.column_end / kLanes - 1);
          Unpack<kBits>(w, inputs.span, unit, begin, end, v, scratch);
        }
      },
      [&](int64_t begin, int64_t end, int64_t, const auto& before, const auto& after) {
        const int64_t first_row = item.row_begin;
        const Block b{.x = rows.Codes(first_row, begin),
                      .spans = rows.Spans(first_row, begin),
                      .rest = rows.rest + first_row * rows.rest_stride + begin,
                      .rest_stride = rows.rest_stride,
                      .panel = scratch.panel.data(),
                      .starts = scratch.starts.data(),
                      .numbers = scratch.numbers.data(),
                      .steps = (end - begin) / 4,
                      .span_steps = inputs.span / 4,
                      .sums = scratch.sums.data(),
                      .first = begin == 0};
        // Not copied anew for every tile: by vectors, whose parts are not at hand when they are
        // read.
        Block part = b;
        const int64_t group_bytes = 4 * b.steps * kMicroRows;
        const int64_t group_spans = rows.SpansOfPanel(begin) * kMicroRows;
        for (int64_t row = 0; row < item.row_end - first_row; row += kMicroRows) {
          const int64_t count = std::min<int64_t>(kMicroRows, item.row_end - first_row - row);
          before(row, count);
          kMicros[static_cast<size_t>(count - 1)](part);
          after(row, count);
          part.x += group_bytes;
          part.spans += group_spans;
          part.rest += kMicroRows * b.rest_stride;
          part.sums += kMicroRows * kSumStride;
        }
      },
      [&](int64_t first, int64_t count, int64_t columns) {
        FinishScaledRows(item.args, inputs, item.row_begin + first, count, item.column_begin,
                         columns, scratch.sums.data() + first * kSumStride, kSumStride);
      });
}

template <int kBits>
void Run(const ops::LinearArgs& args, ThreadPool& pool) {
  const LinearWeights& w = *args.w;
  if (args.rows <= kIntegerStreamRows || w.group < kLeastSpan)
    return replaced_linears({})[kBits](args, pool);
  static thread_local RowScratch own;  // of the engine thread
  RowScratch& scratch = own;
  const int64_t padded = (w.in + kHalfInputs - 1) / kHalfInputs * kHalfInputs;
  const int64_t span = std::min<int64_t>(w.group, quant::kIntegerSpan);
  FoldedRows folded = {.rest_stride = InputStride(w),
                       .rows = (args.rows + kMicroRows - 1) / kMicroRows * kMicroRows,
                       .inputs = padded,
                       .panel = EvenPanelInputs(padded, span, MostPanelInputs()),
                       .span = span};
  const auto reserve = [&](auto& buffer, int64_t of_row) {
    buffer.reserve(static_cast<size_t>(folded.rows * of_row));
    return buffer.data();
  };
  folded.codes = reserve(scratch.codes, padded);
  folded.rest = reserve(scratch.rest, folded.rest_stride);
  folded.spans = reserve(scratch.spans, (padded + span - 1) / span);
  const Inputs inputs = QuantizeInputs<kBits, false>(
      args, pool,
      [&](int8_t* codes, const float* sums, int64_t r) { FoldRow<kBits>(codes, sums, r, folded); });
  PanelPieces(args, pool, kWorthUnpacking, kRowBlock, kColumns, kColumns, kMicroRows,
              [&](const PanelPiece& piece) { Item<kBits>(piece, inputs, folded); });
}

#else

template <int kBits>
void Run(const ops::LinearArgs& args, ThreadPool& pool) {
  replaced_linears({})[kBits](args, pool);
}

#endif

void WinogradW4(const ops::LinearArgs& args, ThreadPool& pool) { Run<4>(args, pool); }
void WinogradW3(const ops::LinearArgs& args, ThreadPool& pool) { Run<3>(args, pool); }
void WinogradW2(const ops::LinearArgs& args, ThreadPool& pool) { Run<2>(args, pool); }

}  // namespace winograd
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fq::backend::cpu {

HWY_EXPORT(WinogradW4);
HWY_EXPORT(WinogradW3);
HWY_EXPORT(WinogradW2);

void FRAMEQUILT_DOT_NAMESPACE::fill_winograd_linear_kernels(Kernels& kernels) {
  replaced_linears(kernels.linear_integer);
  kernels.linear_integer[4] = &HWY_DYNAMIC_DISPATCH(WinogradW4);
  kernels.linear_integer[3] = &HWY_DYNAMIC_DISPATCH(WinogradW3);
  kernels.linear_integer[2] = &HWY_DYNAMIC_DISPATCH(WinogradW2);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
