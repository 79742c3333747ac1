// Linears with quantized inputs: rows become 8-bit codes first, products are integers (exact), and
// each group's sum is scaled in float32 (ops/ops.h gives the order). Two regimes as in the float32
// linears: few rows stream the packed weights once; many rows unpack panels of columns to bytes in
// cache and multiply them in register blocks. Scratch is per thread and kept. Called by the engine
// thread, runs on the pool. Included as a whole by the files of the extensions of
// NEON and AVX2 (integer-inl.h).
#define FRAMEQUILT_WANT_VNNI 1
#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"
#include "src/core/aligned.h"
#include "src/quant/activations.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/linear_integer.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/integer_inputs-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
inline namespace FRAMEQUILT_DOT_NAMESPACE {
#if FRAMEQUILT_HAVE_DOT

// --- Outputs ---------------------------------------------------------------------------------

// Parameters of one span of a unit: value = code * scale + shift.
struct SpanNumbers {
  VF scale, shift;
};

HWY_INLINE SpanNumbers LoadSpan(const LinearWeights& w, int64_t unit, int64_t group) {
  SpanNumbers n;
  n.scale = LoadScales(w, unit, group);
  n.shift = w.offsets != nullptr ? LoadNumbers(w, w.offsets, unit, group)
                                 : hn::Mul(hn::Neg(LoadZeros(w, unit, group)), n.scale);
  return n;
}

HWY_INLINE VF AddSpan(VF sum, VI products, SpanNumbers n, float inputs) {
  sum = hn::MulAdd(n.scale, hn::ConvertTo(DF(), products), sum);
  return hn::MulAdd(n.shift, hn::Set(DF(), inputs), sum);
}

// The sum of a vector of columns, of inputs that are code minus zero times scale.
HWY_INLINE VF ScaledSum(const ops::LinearArgs& args, const Inputs& inputs, int64_t row,
                        int64_t column, VF sum) {
  const DF df;
  if (!args.activations.symmetric) {
    const VF row_sums = hn::LoadU(df, args.w->row_sums + column);
    sum = hn::MulAdd(hn::Set(df, -inputs.zeros[row]), row_sums, sum);
  }
  return hn::Mul(sum, hn::Set(df, inputs.scales[row]));
}

// --- Few rows: weights through registers -----------------------------------------------------

// `count` <= kUnits units of columns from `unit` on, for `rows` <= kRows rows from `row` on. What
// is missing repeats the last one and is not stored.
template <int kBits, int kRows, int kUnits>
HWY_NOINLINE void IntegerStreamUnits(const ops::LinearArgs& args, const Inputs& inputs, int64_t row,
                                     int64_t rows, int64_t unit, int64_t count) {
  constexpr int kPlanes = kDotPlanes<kBits>;
  static_assert(kDotPeriod == 2 * kHalfWords);
  const LinearWeights& w = *args.w;
  const int64_t padded = w.padded_in();
  const int64_t tile_stride = padded / 32 * SuperblockBytes(kBits);
  const auto* const data = static_cast<const std::byte*>(w.data);
  const auto unit_of = [&](int64_t u) FRAMEQUILT_INLINE { return unit + std::min(u, count - 1); };
  // Tiles are short, and several are read at once: a hardware prefetcher does not follow. What is
  // kAhead bytes further in a tile is asked for, 2 KiB in all (four times as much was up to 15 %
  // slower); behind its end, the beginning of the tile that comes at its place next.
  constexpr int64_t kAhead = 2048 / (kUnits * kTilesPerUnit);
  constexpr int64_t kSkipped = std::max(1, kUnits * kLanes / kTileRows) - 1;
  const auto row_of = [&](int64_t r) FRAMEQUILT_INLINE { return row + std::min(r, rows - 1); };
  VF sums[kRows * kUnits];
  Unrolled<kRows * kUnits>([&](auto i) FRAMEQUILT_INLINE { sums[i] = hn::Zero(DF()); });
  const int8_t* x[kRows];
  Unrolled<kRows>([&](auto r)
                      FRAMEQUILT_INLINE { x[r] = inputs.codes + row_of(r) * inputs.stride; });
  int64_t span = 0;
  for (int64_t begin = 0; begin < w.in; begin += inputs.span, ++span) {
    const int64_t end = std::min(begin + inputs.span, padded);
    DotSum<kPlanes> dots[kRows * kUnits];
    Unrolled<kRows * kUnits>([&](auto i) FRAMEQUILT_INLINE { dots[i].Start(); });
    for (int64_t i = begin; i < end;) {
      const int64_t flush = std::min(end, i + 2 * kHalfInputs);
      for (; i < flush; i += kHalfInputs) {
        const std::byte* const superblock = data + i / 32 * SuperblockBytes(kBits);
        const int half = static_cast<int>(i / kHalfInputs % 2);
        Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
          const int64_t at = i / kHalfInputs * (SuperblockBytes(kBits) / 2) + kAhead;
          const std::byte* const next =
              data + (at < tile_stride ? at : at + kSkipped * tile_stride);
          PrefetchWords(next, tile_stride, unit_of(u), 0);
          if constexpr (SuperblockBytes(kBits) / 2 > 64) {
            PrefetchWords(next, tile_stride, unit_of(u), 64);
          }
          VU words[kHalfWords];
          LoadCodes<kBits>(superblock, half, tile_stride, unit_of(u), words);
          // 16 registers do not keep the inputs of several rows from one unit to the next: the
          // compiler would, in memory (13 % slower than reading them again).
          if constexpr (!kManyRegisters && kRows > 1 && u > 0)
            Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE { __asm__("" : "+r"(x[r])); });
          Unrolled<kHalfWords>([&](auto j) FRAMEQUILT_INLINE {
            VU planes[kPlanes];
            CutPlanes<kBits>(words[j], planes);
            Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
              dots[r * kUnits + u].Add(planes, FourInputs(x[r] + i + 4 * j));
            });
          });
        });
      }
      Unrolled<kRows * kUnits>([&](auto k) FRAMEQUILT_INLINE { dots[k].Flush(); });
    }
    const int64_t group = begin / w.group;
    Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
      const SpanNumbers numbers = LoadSpan(w, unit_of(u), group);
      Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
        VF& sum = sums[r * kUnits + u];
        const float of_inputs = inputs.sums[row_of(r) * inputs.spans + span];
        sum = AddSpan(sum, dots[r * kUnits + u].Total(), numbers, of_inputs);
      });
    });
  }
  Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
    if (r >= rows) return;
    Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
      VF& sum = sums[r * kUnits + u];
      sum = ScaledSum(args, inputs, row + r, unit_of(u) * kLanes, sum);
    });
    FinishUnits<kUnits>(args, row + r, unit, count, sums + r * kUnits);
  });
}

// A sum that a dot product instruction adds to takes one register instead of two.
constexpr bool kManySums = kManyRegisters || FRAMEQUILT_DIRECT_DOT;

// As many units as keep enough sums in flight and fit the registers.
template <int kBits, int kRows>
void IntegerStreamRows(const ops::LinearArgs& args, const Inputs& inputs, int64_t row, int64_t rows,
                       int64_t unit, int64_t count) {
  constexpr int kUnits = kRows == 1 ? 4 : kRows == 4 && kManySums ? 2 : 1;
  for (int64_t u = 0; u < count; u += kUnits) {
    IntegerStreamUnits<kBits, kRows, kUnits>(args, inputs, row, rows, unit + u,
                                             std::min<int64_t>(kUnits, count - u));
  }
}

constexpr int64_t kIntegerStreamRows = 8;

// Rows go in blocks; those after the first find the step's weights in cache.
template <int kBits>
void IntegerStream(const ops::LinearArgs& args, const Inputs& inputs, ThreadPool& pool) {
  constexpr int kMost = kManySums ? 8 : 4;
  const auto run = args.rows == 1   ? &IntegerStreamRows<kBits, 1>
                   : args.rows <= 4 ? &IntegerStreamRows<kBits, 4>
                                    : &IntegerStreamRows<kBits, kMost>;
  StreamSteps(args, pool, [&](const ops::LinearArgs& one, int64_t unit, int64_t count) {
    for (int64_t row = 0; row < one.rows; row += kMost)
      run(one, inputs, row, std::min<int64_t>(kMost, one.rows - row), unit, count);
  });
}

// --- Many rows: panels in cache --------------------------------------------------------------

constexpr int kIntegerVectors = 2;  // of a panel
constexpr int64_t kIntegerColumns = kIntegerVectors * kLanes;
constexpr int64_t kIntegerGroupColumns = 64;  // columns of one item of work
// A last vector that is alone gets a neighbour whose sums nobody reads.
constexpr int64_t kIntegerSumStride = kIntegerGroupColumns + kLanes;
constexpr int64_t kIntegerInputs = quant::kIntegerSpan;  // inputs of a panel: whole spans
constexpr int64_t kIntegerSteps = kIntegerInputs / 4;
constexpr int64_t kIntegerRowBlock = kManyRegisters ? 512 : 256;  // rows of one item of work
// 16 registers hold the sums of 6 rows beside the operands; where products need registers of their
// own, a fourth row would send a sum through memory in every step.
constexpr int kIntegerMicroRows = kManyRegisters ? 12 : FRAMEQUILT_DIRECT_DOT ? 6 : 3;

struct IntegerScratch {
  AlignedBuffer<uint32_t> panel;  // [steps, planes, vectors, lanes]
  AlignedBuffer<float> numbers;   // [spans, 2, vectors, lanes]: scales, shifts
  AlignedBuffer<float> sums;      // [rows, columns]
};

inline IntegerScratch& ThreadIntegerScratch() {
  static thread_local IntegerScratch scratch;
  scratch.panel.reserve(static_cast<size_t>(kIntegerSteps * 2 * kIntegerColumns));
  scratch.numbers.reserve(kIntegerInputs / kHalfInputs * 2 * kIntegerColumns);
  scratch.sums.reserve(kIntegerRowBlock * kIntegerSumStride);
  return scratch;
}

// One panel times the same inputs of some rows, added to sums.
struct IntegerBlock {
  const int8_t* x = nullptr;  // [rows, x_stride]
  int64_t x_stride = 0;
  const float* input_sums = nullptr;  // [rows, input_spans], at the panel's first span
  int64_t input_spans = 0;
  const uint32_t* panel = nullptr;
  const float* numbers = nullptr;
  int64_t steps = 0, span_steps = 0;
  float* sums = nullptr;  // [rows, kIntegerSumStride]
  bool first = false;     // start from 0 instead of from sums
};

// totals[row][vector], 0 before: products of `steps` words of a panel and of the inputs of some
// rows.
#if FRAMEQUILT_DIRECT_DOT
// Of two planes the high one goes first, so that both share their accumulators.
template <int kPlanes, int kRows>
HWY_INLINE void AddProducts(const uint32_t* HWY_RESTRICT panel, const int8_t* HWY_RESTRICT x,
                            int64_t x_stride, int64_t steps, VI* totals) {
  constexpr int kVectors = kIntegerVectors;
  Unrolled<kPlanes>([&](auto pass) FRAMEQUILT_INLINE {
    if constexpr (pass > 0) {
      Unrolled<kRows * kVectors>(
          [&](auto i) FRAMEQUILT_INLINE { totals[i] = hn::ShiftLeft<4>(totals[i]); });
    }
    const uint32_t* HWY_RESTRICT words = panel + (kPlanes - 1 - pass) * kVectors * kLanes;
    const int8_t* HWY_RESTRICT row = x;
    for (int64_t step = 0; step < steps; ++step, words += kPlanes * kVectors * kLanes, row += 4) {
      VU codes[kVectors];
      Unrolled<kVectors>([&](auto v)
                             FRAMEQUILT_INLINE { codes[v] = hn::Load(DU(), words + v * kLanes); });
      Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
        const VU inputs = FourInputs(row + r * x_stride);
        Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
          VI& total = totals[r * kVectors + v];
          total = DirectDot(total, codes[v], inputs);
        });
      });
    }
  });
}
#else
// Pair sums stay in registers for kDotPeriod steps: all vectors at once, or, where codes have two
// planes, one vector after the other.
template <int kPlanes, int kRows, int kStepsAtOnce>
HWY_INLINE void AddPairProducts(const uint32_t* HWY_RESTRICT panel, const int8_t* HWY_RESTRICT x,
                                int64_t x_stride, int64_t steps, VI* totals) {
  constexpr int kVectors = kIntegerVectors;
  constexpr int kPasses = kPlanes == 2 ? kVectors : 1;
  constexpr int kWide = kVectors / kPasses;
  Unrolled<kPasses>([&](auto pass) FRAMEQUILT_INLINE {
    VS part[kRows * kWide * kPlanes];
    const auto step = [&](auto first, int64_t at) FRAMEQUILT_INLINE {
      VU codes[kWide * kPlanes];
      Unrolled<kWide * kPlanes>([&](auto i) FRAMEQUILT_INLINE {
        const int64_t vector = pass + i / kPlanes;
        codes[i] =
            hn::Load(DU(), panel + ((at * kPlanes + i % kPlanes) * kVectors + vector) * kLanes);
      });
      Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
        const VU inputs = FourInputs(x + r * x_stride + 4 * at);
        Unrolled<kWide * kPlanes>([&](auto i) FRAMEQUILT_INLINE {
          const VS products = PairProducts(codes[i], inputs);
          VS& sum = part[r * kWide * kPlanes + i];
          sum = first ? products : hn::Add(sum, products);
          KeepInRegister(sum);
        });
      });
    };
    step(std::true_type(), 0);
    if constexpr (kStepsAtOnce > 0) {
      Unrolled<kStepsAtOnce - 1>([&](auto i) FRAMEQUILT_INLINE { step(std::false_type(), i + 1); });
    } else {
      for (int64_t i = 1; i < steps; ++i) step(std::false_type(), i);
    }
    Unrolled<kRows * kWide * kPlanes>([&](auto i) FRAMEQUILT_INLINE {
      constexpr int kPlane = i % kPlanes, kVector = pass + i / kPlanes % kWide;
      VI& total = totals[i / (kWide * kPlanes) * kVectors + kVector];
      total = AddPairs < kPlane == 0 ? 1 : 16 > (total, part[i]);
    });
  });
}

template <int kPlanes, int kRows>
HWY_INLINE void AddProducts(const uint32_t* HWY_RESTRICT panel, const int8_t* HWY_RESTRICT x,
                            int64_t x_stride, int64_t steps, VI* totals) {
  constexpr int64_t kWords = int64_t{kPlanes} * kIntegerVectors * kLanes;
  int64_t step = 0;
  for (; step + kDotPeriod <= steps; step += kDotPeriod) {
    AddPairProducts<kPlanes, kRows, kDotPeriod>(panel + step * kWords, x + 4 * step, x_stride, 0,
                                                totals);
  }
  if (step < steps) {
    AddPairProducts<kPlanes, kRows, 0>(panel + step * kWords, x + 4 * step, x_stride, steps - step,
                                       totals);
  }
}
#endif

template <int kPlanes, int kRows>
HWY_NOINLINE void IntegerMicro(const IntegerBlock& b) {
  constexpr int kVectors = kIntegerVectors;
  const DF df;
  const float* HWY_RESTRICT numbers = b.numbers;
  int64_t span = 0;
  for (int64_t begin = 0; begin < b.steps; begin += b.span_steps, ++span) {
    const int64_t end = std::min(begin + b.span_steps, b.steps);
    VI totals[kRows * kVectors];
    Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE { totals[i] = hn::Zero(DI()); });
    AddProducts<kPlanes, kRows>(b.panel + begin * kPlanes * kVectors * kLanes, b.x + 4 * begin,
                                b.x_stride, end - begin, totals);
    SpanNumbers n[kVectors];
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      n[v].scale = hn::Load(df, numbers + v * kLanes);
      n[v].shift = hn::Load(df, numbers + (kVectors + v) * kLanes);
    });
    numbers += 2 * kVectors * kLanes;
    const bool fresh = b.first && begin == 0;
    Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
      float* const sums = b.sums + r * kIntegerSumStride;
      const float inputs = b.input_sums[r * b.input_spans + span];
      Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
        const VF old = fresh ? hn::Zero(df) : hn::Load(df, sums + v * kLanes);
        hn::Store(AddSpan(old, totals[r * kVectors + v], n[v], inputs), df, sums + v * kLanes);
      });
    });
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
template <int kPlanes, int... kI>
constexpr std::array<IntegerMicroFn, sizeof...(kI)> MakeIntegerMicros(
    std::integer_sequence<int, kI...>) {
  return {&IntegerMicro<kPlanes, kI + kIntegerLeastRows>...};
}
template <int kPlanes>
constexpr auto kIntegerMicros = MakeIntegerMicros<kPlanes>(
    std::make_integer_sequence<int, kIntegerMicroRows - kIntegerLeastRows + 1>());

// All `rows` of a panel, in tiles of even size: before(begin, count) and after(begin, count) are
// called around the rows of each.
template <int kPlanes, class Before, class After>
void IntegerPanel(const IntegerBlock& b, int64_t rows, const Before& before, const After& after) {
  const int64_t tiles = (rows + kIntegerMicroRows - 1) / kIntegerMicroRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = rows * tile / tiles;
    const int64_t count = rows * (tile + 1) / tiles - begin;
    before(begin, count);
    IntegerBlock part = b;
    part.x += begin * b.x_stride;
    part.input_sums += begin * b.input_spans;
    part.sums += begin * kIntegerSumStride;
    kIntegerMicros<kPlanes>[static_cast<size_t>(count - kIntegerLeastRows)](part);
    after(begin, count);
  }
}

// Codes of inputs [begin, end) x `unit` as bytes, and the numbers of their spans, as vector
// `vector` of a panel.
template <int kBits>
HWY_NOINLINE void UnpackUnit(const LinearWeights& w, int64_t span, int64_t unit, int64_t begin,
                             int64_t end, int64_t vector, IntegerScratch& scratch) {
  constexpr int kPlanes = kDotPlanes<kBits>;
  const int64_t tile_stride = w.padded_in() / 32 * SuperblockBytes(kBits);
  const auto* const data = static_cast<const std::byte*>(w.data);
  uint32_t* to = scratch.panel.data() + vector * kLanes;
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
  float* number = scratch.numbers.data() + vector * kLanes;
  for (int64_t i = begin; i < std::min<int64_t>(end, w.in); i += span) {
    const SpanNumbers n = LoadSpan(w, unit, i / w.group);
    hn::Store(n.scale, DF(), number);
    hn::Store(n.shift, DF(), number + kIntegerColumns);
    number += 2 * kIntegerColumns;
  }
}

template <int kBits>
void IntegerItem(const PanelPiece& item, const Inputs& inputs) {
  const LinearWeights& w = *item.args.w;
  IntegerScratch& scratch = ThreadIntegerScratch();
  const int64_t padded = (w.in + kHalfInputs - 1) / kHalfInputs * kHalfInputs;
  ForPanels(
      item, padded, kIntegerInputs, kIntegerColumns,
      [&](const LinearWeights& next, int64_t column, int64_t begin) {
        return AskFor(next, next.padded_in() / 32 * SuperblockBytes(kBits), SuperblockBytes(kBits),
                      column, kIntegerColumns, begin, std::min(begin + kIntegerInputs, padded));
      },
      [&](int64_t begin, int64_t end, int64_t column) {
        for (int64_t v = 0; v < kIntegerVectors; ++v) {
          const int64_t unit = std::min(column / kLanes + v, item.column_end / kLanes - 1);
          UnpackUnit<kBits>(w, inputs.span, unit, begin, end, v, scratch);
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
        b.first = begin == 0;
        b.sums = scratch.sums.data() + (column - item.column_begin);
        IntegerPanel<kDotPlanes<kBits>>(b, item.row_end - item.row_begin, before, after);
      },
      [&](int64_t row, int64_t columns) {
        float* const sums = scratch.sums.data() + row * kIntegerSumStride;
        const int64_t r = item.row_begin + row;
        for (int64_t c = 0; c < columns; c += kLanes) {
          const VF sum = hn::Load(DF(), sums + c);
          hn::Store(ScaledSum(item.args, inputs, r, item.column_begin + c, sum), DF(), sums + c);
        }
        FinishColumns(item.args, r, item.column_begin, columns, sums);
      });
}

template <int kBits>
void IntegerPanels(const ops::LinearArgs& args, const Inputs& inputs, ThreadPool& pool) {
  PanelPieces(args, pool, kIntegerRowBlock, kIntegerGroupColumns, kIntegerColumns,
              [&](const PanelPiece& piece) { IntegerItem<kBits>(piece, inputs); });
}

template <int kBits>
void RunInteger(const ops::LinearArgs& args, ThreadPool& pool) {
  if (args.rows == 0) return;
  const Inputs inputs = QuantizeInputs(args, pool);
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

#if FRAMEQUILT_NEON_DOT == 2
void fill_neon_i8mm_linear_kernels(Kernels& kernels) {
#elif FRAMEQUILT_NEON_DOT == 1
void fill_neon_dot_linear_kernels(Kernels& kernels) {
#elif FRAMEQUILT_AVX2_DOT == 2
void fill_avx512_vnni_linear_kernels(Kernels& kernels) {
#elif FRAMEQUILT_AVX2_DOT == 1
void fill_avx_vnni_linear_kernels(Kernels& kernels) {
#else
void fill_integer_linear_kernels(Kernels& kernels) {
#endif
  kernels.linear_integer[8] = &HWY_DYNAMIC_DISPATCH(IntegerW8);
  kernels.linear_integer[6] = &HWY_DYNAMIC_DISPATCH(IntegerW6);
  kernels.linear_integer[5] = &HWY_DYNAMIC_DISPATCH(IntegerW5);
  kernels.linear_integer[4] = &HWY_DYNAMIC_DISPATCH(IntegerW4);
  kernels.linear_integer[3] = &HWY_DYNAMIC_DISPATCH(IntegerW3);
  kernels.linear_integer[2] = &HWY_DYNAMIC_DISPATCH(IntegerW2);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
