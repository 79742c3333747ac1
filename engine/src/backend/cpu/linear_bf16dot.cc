// Linears whose inputs are rounded to bfloat16, for processors that multiply such numbers in pairs
// (AVX512_BF16): products are summed in float32 over spans of inputs, and each span's sum is scaled
// (ops/ops.h). Two regimes as in the other linears: few rows stream the packed weights once; many
// rows unpack panels of columns to pairs in cache and multiply them in register blocks. Both add
// the same products in the same order. Scratch is per thread and kept. Called by the engine thread,
// runs on the pool.
#define FRAMEQUILT_WANT_VNNI 1
#include <algorithm>
#include <array>

#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"
#include "src/core/aligned.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/linear_bf16dot.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/amx_panel-inl.h"
#include "src/backend/cpu/bf16dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
inline namespace FRAMEQUILT_DOT_NAMESPACE {
#if FRAMEQUILT_HAVE_BF16_DOT

// --- Outputs ---------------------------------------------------------------------------------

// What a span's sums are multiplied with. Without codes the scale is 1; without offsets there are
// no sums of inputs to multiply.
struct SpanFactors {
  VF scale, offset;
};

template <class Format>
HWY_INLINE SpanFactors LoadFactors(const LinearWeights& w, int64_t unit, int64_t group) {
  const DF df;
  SpanFactors f{hn::Set(df, 1.0f), hn::Zero(df)};
  if constexpr (Format::kCodes) {
    f.scale = LoadScales(w, unit, group);
    if (w.offsets != nullptr) f.offset = LoadOffsets(w, unit, group);
  }
  return f;
}

// `inputs`: the sum of the span's inputs, where there are offsets.
HWY_INLINE VF AddSpan(VF sum, VF products, const SpanFactors& f, const float* inputs) {
  sum = hn::MulAdd(f.scale, products, sum);
  return inputs != nullptr ? hn::MulAdd(f.offset, hn::Set(DF(), *inputs), sum) : sum;
}

template <class Format>
int64_t GroupOf(const LinearWeights& w, int64_t input) {
  return Format::kCodes ? input / w.group : 0;
}

// --- Few rows: weights through registers -----------------------------------------------------

// The sum of the products of pairs, in the order that the target has for all rows. A part is what a
// tile of AMX holds: 32 inputs, or a shorter span.
#if FRAMEQUILT_HAVE_AMX
// Even and odd inputs of a part are summed apart, then added: what tdpbf16ps does.
struct PairSum {
  VF sum, even, odd;

  HWY_INLINE void Start() { sum = even = odd = hn::Zero(DF()); }
  HWY_INLINE void Add(VU pairs, VU inputs) {
    even = PairDot(even, pairs, hn::And(inputs, hn::Set(DU(), 0xFFFFu)));
    odd = PairDot(odd, pairs, hn::And(inputs, hn::Set(DU(), 0xFFFF0000u)));
  }
  HWY_INLINE void EndPart() {
    sum = Normal(hn::Add(sum, Normal(hn::Add(even, odd))));
    even = odd = hn::Zero(DF());
  }

 private:
  // Subnormal results are zeros.
  static HWY_INLINE VF Normal(VF x) {
    return hn::IfThenZeroElse(hn::Lt(hn::Abs(x), hn::Set(DF(), 0x1p-126f)), x);
  }
};
constexpr int64_t kPairPart = kTileBytes / 2;
#else
struct PairSum {
  VF sum;

  HWY_INLINE void Start() { sum = hn::Zero(DF()); }
  HWY_INLINE void Add(VU pairs, VU inputs) { sum = PairDot(sum, pairs, inputs); }
  HWY_INLINE void EndPart() {}
};
constexpr int64_t kPairPart = kHalfInputs;
#endif

// `count` <= kUnits units of columns from `unit` on, for `rows` <= kRows rows from `row` on. What
// is missing repeats the last one and is not stored.
template <class Format, int kRows, int kUnits>
HWY_NOINLINE void StreamPairs(const ops::LinearArgs& args, const RoundedInputs& inputs, int64_t row,
                              int64_t rows, int64_t unit, int64_t count) {
  const DF df;
  const LinearWeights& w = *args.w;
  const int64_t padded = w.padded_in();
  const int64_t tile_stride = Format::TileStride(w);
  const auto* const data = static_cast<const std::byte*>(w.data);
  const auto unit_of = [&](int64_t u) FRAMEQUILT_INLINE { return unit + std::min(u, count - 1); };
  const auto row_of = [&](int64_t r) FRAMEQUILT_INLINE { return row + std::min(r, rows - 1); };
  constexpr int64_t kHalfBytes = Format::kBytesPer32 / 2;
  VF sums[kRows * kUnits];
  Unrolled<kRows * kUnits>([&](auto i) FRAMEQUILT_INLINE { sums[i] = hn::Zero(df); });
  const uint16_t* x[kRows];
  Unrolled<kRows>([&](auto r)
                      FRAMEQUILT_INLINE { x[r] = inputs.values + row_of(r) * inputs.stride; });
  int64_t span = 0;
  for (int64_t begin = 0; begin < w.in; begin += inputs.span, ++span) {
    const int64_t end = std::min(begin + inputs.span, padded);
    const int64_t group = GroupOf<Format>(w, begin);
    PairSum dots[kRows * kUnits];
    Unrolled<kRows * kUnits>([&](auto i) FRAMEQUILT_INLINE { dots[i].Start(); });
    typename Format::Zeros zeros[kUnits];
    Unrolled<kUnits>([&](auto u)
                         FRAMEQUILT_INLINE { zeros[u] = Format::LoadZeros(w, unit_of(u), group); });
    for (int64_t i = begin; i < std::min<int64_t>(end, w.in); i += kHalfInputs) {
      Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
        PrefetchUnit<kUnits, kHalfBytes>(UnitWords(data, tile_stride, unit_of(u)), tile_stride,
                                         i / kHalfInputs * kHalfBytes);
        VU pairs[kHalfPairs];
        Format::Load(w, tile_stride, unit_of(u), i, zeros[u], pairs);
        Unrolled<kHalfPairs>([&](auto p) FRAMEQUILT_INLINE {
          Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
            dots[r * kUnits + u].Add(pairs[p], TwoInputs(x[r] + i + 2 * p));
          });
        });
      });
      const int64_t next_input = i + kHalfInputs;
      if (next_input % kPairPart == 0 || next_input >= std::min<int64_t>(end, w.in))
        Unrolled<kRows * kUnits>([&](auto k) FRAMEQUILT_INLINE { dots[k].EndPart(); });
    }
    Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
      const SpanFactors factors = LoadFactors<Format>(w, unit_of(u), group);
      Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
        VF& sum = sums[r * kUnits + u];
        const float* const of_inputs =
            inputs.sums != nullptr ? inputs.sums + row_of(r) * inputs.spans + span : nullptr;
        sum = AddSpan(sum, dots[r * kUnits + u].sum, factors, of_inputs);
      });
    });
  }
  Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
    if (r < rows) FinishUnits<kUnits>(args, row + r, unit, count, sums + r * kUnits);
  });
}

// As many units as keep enough sums in flight and fit the registers.
template <class Format, int kRows>
void StreamPairRows(const ops::LinearArgs& args, const RoundedInputs& inputs, int64_t row,
                    int64_t rows, int64_t unit, int64_t count) {
  constexpr int kUnits = kRows == 1 ? 4 : kRows == 4 ? 2 : 1;
  for (int64_t u = 0; u < count; u += kUnits) {
    StreamPairs<Format, kRows, kUnits>(args, inputs, row, rows, unit + u,
                                       std::min<int64_t>(kUnits, count - u));
  }
}

// More rows take matrix registers, where there are some.
constexpr int64_t kPairStreamRows = FRAMEQUILT_HAVE_AMX ? 1 : 8;

template <class Format>
void StreamAllPairs(const ops::LinearArgs& args, const RoundedInputs& inputs, ThreadPool& pool) {
  const auto run = args.rows == 1   ? &StreamPairRows<Format, 1>
                   : args.rows <= 4 ? &StreamPairRows<Format, 4>
                                    : &StreamPairRows<Format, kPairStreamRows>;
  StreamSteps(args, pool, kStreamStep,
              [&](const ops::LinearArgs& one, int64_t unit, int64_t count) {
                run(one, inputs, 0, one.rows, unit, count);
              });
}

// --- Many rows: panels in cache --------------------------------------------------------------

constexpr int kPairVectors = 2;  // of a panel
constexpr int64_t kPairColumns = kPairVectors * kLanes;
constexpr int64_t kPairGroupColumns = 64;  // columns of one item of work
// A last vector that is alone gets a neighbour whose sums nobody reads.
constexpr int64_t kPairSumStride = kPairGroupColumns + kLanes;
constexpr int64_t kPairInputs = quant::kRoundedSpan;  // inputs of a panel: whole spans
constexpr int64_t kPairRowBlock = 512;                // rows of one item of work
constexpr int kPairMicroRows = kMaxAccumulators / kPairVectors;

struct PairScratch {
  AlignedBuffer<uint32_t> panel;  // [steps, vectors, lanes]
  AlignedBuffer<float> numbers;   // [spans, 2, vectors, lanes]: scales, offsets
  AlignedBuffer<float> sums;      // [rows, columns]
};

inline PairScratch& ThreadPairScratch() {
  static thread_local PairScratch scratch;
  scratch.panel.reserve(kPairInputs / 2 * kPairColumns);
  scratch.numbers.reserve(kPairInputs / kHalfInputs * 2 * kPairColumns);
  scratch.sums.reserve((kPairRowBlock + kSpareRows) * kPairSumStride);
  return scratch;
}

// One panel times the same inputs of some rows, added to sums.
struct PairBlock {
  const uint16_t* x = nullptr;  // [rows, x_stride]
  int64_t x_stride = 0;
  const float* input_sums = nullptr;  // [rows, input_spans], at the panel's first span, or nullptr
  int64_t input_spans = 0;
  const uint32_t* panel = nullptr;
  const float* numbers = nullptr;
  int64_t steps = 0, span_steps = 0;  // pairs
  int64_t tile_bytes = 0;             // of AMX only
  float* sums = nullptr;              // [rows, kPairSumStride]
  bool first = false;                 // start from 0 instead of from sums
};

template <int kRows>
HWY_NOINLINE void PairMicro(const PairBlock& b) {
  constexpr int kVectors = kPairVectors;
  const DF df;
  const float* HWY_RESTRICT numbers = b.numbers;
  const uint32_t* HWY_RESTRICT weights = b.panel;
  const uint16_t* HWY_RESTRICT x = b.x;
  const int64_t x_stride = b.x_stride;
  int64_t span = 0;
  for (int64_t begin = 0; begin < b.steps; begin += b.span_steps, ++span) {
    const int64_t end = std::min(begin + b.span_steps, b.steps);
    VF dots[kRows * kVectors];
    Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE { dots[i] = hn::Zero(df); });
    for (int64_t step = begin; step < end; ++step, weights += kVectors * kLanes, x += 2) {
      VU pairs[kVectors];
      Unrolled<kVectors>(
          [&](auto v) FRAMEQUILT_INLINE { pairs[v] = hn::Load(DU(), weights + v * kLanes); });
      Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
        const VU inputs = TwoInputs(x + r * x_stride);
        Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
          dots[r * kVectors + v] = PairDot(dots[r * kVectors + v], pairs[v], inputs);
        });
      });
    }
    SpanFactors factors[kVectors];
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      factors[v].scale = hn::Load(df, numbers + v * kLanes);
      factors[v].offset = hn::Load(df, numbers + (kVectors + v) * kLanes);
    });
    numbers += 2 * kVectors * kLanes;
    const bool fresh = b.first && begin == 0;
    Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
      float* const sums = b.sums + r * kPairSumStride;
      const float* const of_inputs =
          b.input_sums != nullptr ? b.input_sums + r * b.input_spans + span : nullptr;
      Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
        const VF old = fresh ? hn::Zero(df) : hn::Load(df, sums + v * kLanes);
        const VF sum = AddSpan(old, dots[r * kVectors + v], factors[v], of_inputs);
        hn::Store(sum, df, sums + v * kLanes);
      });
    });
  }
}

using PairMicroFn = void (*)(const PairBlock&);
// Kernels for kLeast.. rows: even cuts of more rows than are streamed are never smaller.
constexpr int kPairLeastRows = 6;
template <int... kI>
constexpr std::array<PairMicroFn, sizeof...(kI)> MakePairMicros(std::integer_sequence<int, kI...>) {
  return {&PairMicro<kI + kPairLeastRows>...};
}
constexpr auto kPairMicros =
    MakePairMicros(std::make_integer_sequence<int, kPairMicroRows - kPairLeastRows + 1>());
static_assert(FRAMEQUILT_HAVE_AMX ||
              (kPairStreamRows + 1 >= kPairLeastRows && kPairMicroRows + 1 >= 2 * kPairLeastRows));

#if FRAMEQUILT_HAVE_AMX
struct PairTiles {
  using Block = PairBlock;
  using Numbers = SpanFactors;
  static constexpr TileKind kTiles{.bf16 = true};
  static HWY_INLINE Numbers LoadNumbers(const float* numbers) {
    return {hn::Load(DF(), numbers), hn::Load(DF(), numbers + kPairColumns)};
  }
  using RowInputs = const float*;
  static HWY_INLINE const float* LoadInputs(const float* inputs) { return inputs; }
  static HWY_INLINE VF Add(VF old, const int32_t* sums, const Numbers& n, const float* inputs) {
    return AddSpan(old, hn::BitCast(DF(), hn::Load(DI(), sums)), n, inputs);
  }
};
#endif

// All `rows` of a panel, with before() and after() around the products of some of them.
template <class Before, class After>
void PairPanel(const PairBlock& b, int64_t rows, const Before& before, const After& after) {
#if FRAMEQUILT_HAVE_AMX
  AmxPanel<PairTiles, kPairSumStride>(b, rows, 1, {}, before, after);
#else
  ForTiles(rows, kPairMicroRows, [&](int64_t begin, int64_t count) FRAMEQUILT_INLINE {
    before(begin, count);
    PairBlock part = b;
    part.x += begin * b.x_stride;
    if (b.input_sums != nullptr) part.input_sums += begin * b.input_spans;
    part.sums += begin * kPairSumStride;
    kPairMicros[static_cast<size_t>(count - kPairLeastRows)](part);
    after(begin, count);
  });
#endif
}

// Weights of inputs [begin, end) x `unit` as pairs, and the numbers of their spans, as vector
// `vector` of a panel.
template <class Format>
HWY_NOINLINE void UnpackPairs(const LinearWeights& w, int64_t span, int64_t unit, int64_t begin,
                              int64_t end, int64_t vector, PairScratch& scratch) {
  const int64_t tile_stride = Format::TileStride(w);
  uint32_t* to = scratch.panel.data() + vector * kLanes;
  float* number = scratch.numbers.data() + vector * kLanes;
  for (int64_t first = begin; first < end; first += span) {
    const int64_t group = GroupOf<Format>(w, first);
    const typename Format::Zeros zeros = Format::LoadZeros(w, unit, group);
    for (int64_t i = first; i < std::min(first + span, end); i += kHalfInputs) {
      VU pairs[kHalfPairs];
      Format::Load(w, tile_stride, unit, i, zeros, pairs);
      Unrolled<kHalfPairs>([&](auto p) FRAMEQUILT_INLINE {
        hn::Store(pairs[p], DU(), to);
        to += kPairColumns;
      });
    }
    const SpanFactors factors = LoadFactors<Format>(w, unit, group);
    hn::Store(factors.scale, DF(), number);
    hn::Store(factors.offset, DF(), number + kPairColumns);
    number += 2 * kPairColumns;
  }
#if FRAMEQUILT_HAVE_AMX
  // The rest of the last tile. The inputs there are 0, but 0 times what was there may not be.
  for (int64_t i = end; i % (BytesOfTile(2 * span) / 2) != 0; i += 2, to += kPairColumns)
    hn::Store(hn::Zero(DU()), DU(), to);
#endif
}

template <class Format>
void PairItem(const PanelPiece& item, const RoundedInputs& inputs) {
  const LinearWeights& w = *item.args.w;
  PairScratch& scratch = ThreadPairScratch();
#if FRAMEQUILT_HAVE_AMX
  const Tiles tiles(BytesOfTile(2 * inputs.span));
#endif
  const int64_t padded = (w.in + kHalfInputs - 1) / kHalfInputs * kHalfInputs;
  ForPanels(
      item, padded, kPairInputs, kPairColumns,
      [&](const LinearWeights& next, int64_t column, int64_t begin) {
        return AskFor(next, Format::TileStride(next), Format::kBytesPer32, column, kPairColumns,
                      begin, std::min(begin + kPairInputs, padded));
      },
      [&](int64_t begin, int64_t end, int64_t column) {
        for (int64_t v = 0; v < kPairVectors; ++v) {
          const int64_t unit = std::min(column / kLanes + v, item.column_end / kLanes - 1);
          UnpackPairs<Format>(w, inputs.span, unit, begin, end, v, scratch);
        }
      },
      [&](int64_t begin, int64_t end, int64_t column, const auto& before, const auto& after) {
        PairBlock b;
        b.x = inputs.values + item.row_begin * inputs.stride + begin;
        b.x_stride = inputs.stride;
        if (inputs.sums != nullptr) {
          b.input_spans = inputs.spans;
          b.input_sums = inputs.sums + item.row_begin * inputs.spans + begin / inputs.span;
        }
        b.panel = scratch.panel.data();
        b.numbers = scratch.numbers.data();
        b.steps = (end - begin) / 2;
        b.span_steps = inputs.span / 2;
#if FRAMEQUILT_HAVE_AMX
        b.tile_bytes = BytesOfTile(2 * inputs.span);
#endif
        b.first = begin == 0;
        b.sums = scratch.sums.data() + (column - item.column_begin);
        PairPanel(b, item.row_end - item.row_begin, before, after);
      },
      [&](int64_t first, int64_t count, int64_t columns) {
        FinishRows(item.args, item.row_begin + first, count, item.column_begin, columns,
                   scratch.sums.data() + first * kPairSumStride, kPairSumStride);
      });
}

template <class Format>
void RunPairs(const ops::LinearArgs& args, ThreadPool& pool) {
  if (args.rows == 0) return;
  const int64_t span =
      Format::kCodes ? std::min<int64_t>(args.w->group, quant::kRoundedSpan) : quant::kRoundedSpan;
  const RoundedInputs inputs = RoundInputs<Format::kInOrder>(args, pool, span);
  if (args.rows <= kPairStreamRows) return StreamAllPairs<Format>(args, inputs, pool);
  PanelPieces(args, pool, kWorthUnpacking, kPairRowBlock, kPairGroupColumns, kPairColumns, 1,
              [&](const PanelPiece& piece) { PairItem<Format>(piece, inputs); });
}

void Bf16DotBF16(const ops::LinearArgs& args, ThreadPool& pool) {
  RunPairs<StoredPairs>(args, pool);
}
void Bf16DotW8(const ops::LinearArgs& args, ThreadPool& pool) {
  RunPairs<CodePairs<8>>(args, pool);
}
void Bf16DotW6(const ops::LinearArgs& args, ThreadPool& pool) {
  RunPairs<CodePairs<6>>(args, pool);
}
void Bf16DotW5(const ops::LinearArgs& args, ThreadPool& pool) {
  RunPairs<CodePairs<5>>(args, pool);
}
void Bf16DotW4(const ops::LinearArgs& args, ThreadPool& pool) {
  RunPairs<CodePairs<4>>(args, pool);
}
void Bf16DotW3(const ops::LinearArgs& args, ThreadPool& pool) {
  RunPairs<CodePairs<3>>(args, pool);
}
void Bf16DotW2(const ops::LinearArgs& args, ThreadPool& pool) {
  RunPairs<CodePairs<2>>(args, pool);
}

#else  // never chosen, see targets.cc

void Bf16DotBF16(const ops::LinearArgs&, ThreadPool&) {}
void Bf16DotW8(const ops::LinearArgs&, ThreadPool&) {}
void Bf16DotW6(const ops::LinearArgs&, ThreadPool&) {}
void Bf16DotW5(const ops::LinearArgs&, ThreadPool&) {}
void Bf16DotW4(const ops::LinearArgs&, ThreadPool&) {}
void Bf16DotW3(const ops::LinearArgs&, ThreadPool&) {}
void Bf16DotW2(const ops::LinearArgs&, ThreadPool&) {}

#endif
}  // namespace FRAMEQUILT_DOT_NAMESPACE
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fq::backend::cpu {

HWY_EXPORT(Bf16DotBF16);
HWY_EXPORT(Bf16DotW8);
HWY_EXPORT(Bf16DotW6);
HWY_EXPORT(Bf16DotW5);
HWY_EXPORT(Bf16DotW4);
HWY_EXPORT(Bf16DotW3);
HWY_EXPORT(Bf16DotW2);

void FRAMEQUILT_DOT_NAMESPACE::fill_bf16dot_linear_kernels(Kernels& kernels) {
  kernels.linear_bf16dot[16] = &HWY_DYNAMIC_DISPATCH(Bf16DotBF16);
  kernels.linear_bf16dot[8] = &HWY_DYNAMIC_DISPATCH(Bf16DotW8);
  kernels.linear_bf16dot[6] = &HWY_DYNAMIC_DISPATCH(Bf16DotW6);
  kernels.linear_bf16dot[5] = &HWY_DYNAMIC_DISPATCH(Bf16DotW5);
  kernels.linear_bf16dot[4] = &HWY_DYNAMIC_DISPATCH(Bf16DotW4);
  kernels.linear_bf16dot[3] = &HWY_DYNAMIC_DISPATCH(Bf16DotW3);
  kernels.linear_bf16dot[2] = &HWY_DYNAMIC_DISPATCH(Bf16DotW2);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
