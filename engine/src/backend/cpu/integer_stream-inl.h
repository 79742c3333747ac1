// Integer linears of few rows: the packed weights are read once and go through registers. Also how
// the integer sums of a span become float32. Included once per SIMD target and extension.
#if defined(FRAMEQUILT_CPU_INTEGER_STREAM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_INTEGER_STREAM_INL_H_
#undef FRAMEQUILT_CPU_INTEGER_STREAM_INL_H_
#else
#define FRAMEQUILT_CPU_INTEGER_STREAM_INL_H_
#endif

#include <algorithm>
#include <cstddef>

#include "hwy/highway.h"
#include "src/backend/cpu/integer_inputs-inl.h"
#include "src/backend/cpu/tile_stream-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
inline namespace FRAMEQUILT_DOT_NAMESPACE {
#if FRAMEQUILT_HAVE_DOT

// --- Sums of spans -------------------------------------------------------------------------------

// Parameters of one span of a unit: value = code * scale + shift.
struct SpanNumbers {
  VF scale, shift;
};

HWY_INLINE SpanNumbers LoadSpan(const LinearWeights& w, int64_t unit, int64_t group) {
  SpanNumbers n;
  n.scale = LoadScales(w, unit, group);
  n.shift = w.offsets != nullptr ? LoadOffsets(w, unit, group)
                                 : hn::Mul(hn::Neg(LoadZeros(w, unit, group)), n.scale);
  return n;
}

HWY_INLINE VF AddSpan(VF sum, VI products, SpanNumbers n, VF inputs) {
  sum = hn::MulAdd(n.scale, hn::ConvertTo(DF(), products), sum);
  return hn::MulAdd(n.shift, inputs, sum);
}
HWY_INLINE VF AddSpan(VF sum, VI products, SpanNumbers n, float inputs) {
  return AddSpan(sum, products, n, hn::Set(DF(), inputs));
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

// The outputs of some rows and columns, from sums [rows][sum_stride]. Out of line: every kernel of
// many rows ends with this.
inline HWY_NOINLINE void FinishScaledRows(const ops::LinearArgs& args, const Inputs& inputs,
                                          int64_t row, int64_t rows, int64_t column, int64_t count,
                                          const float* sums, int64_t sum_stride) {
  FinishRowsOf(args, row, rows, column, count, [&](int64_t r, int64_t i) FRAMEQUILT_INLINE {
    const VF sum = hn::Load(DF(), sums + r * sum_stride + i);
    return ScaledSum(args, inputs, row + r, column + i, sum);
  });
}

// --- Weights through registers -------------------------------------------------------------------

// One row and whole tiles, where sums of products do not wait for each other: a tile after the
// other, and nothing asked for ahead. Hardware prefetchers follow one stream, and reach further
// than what a core can wait for itself. On a Zen 4 (AVX2) four tiles at once decoded the 0.5B at
// five sixths of that rate, two at less, and asking 1 to 16 KiB ahead cost another 5 to 15 %.
template <int kRows>
constexpr bool kOneStream = kRows == 1 && !FRAMEQUILT_DIRECT_DOT && kLanes == kTileRows;

// kUnits units of columns times kRows rows. Of `count` units from `unit` on and `rows` rows from
// `row` on: what is missing repeats the last one and is not stored.
template <int kBits, int kRows, int kUnits>
class StreamTile {
 public:
  StreamTile(const ops::LinearArgs& args, const Inputs& inputs, int64_t row, int64_t rows,
             int64_t unit, int64_t count)
      : args_(args),
        inputs_(inputs),
        w_(*args.w),
        tile_stride_(w_.padded_in() / 32 * SuperblockBytes(kBits)),
        row_(row),
        rows_(rows),
        unit_(unit),
        count_(count) {
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t real = row + std::min(r, rows - 1);
      x_[r] = inputs.codes + real * inputs.stride;
      sums_[r] = inputs.sums + real * inputs.spans;
      if constexpr (kLongPairs) periods_[r] = inputs.periods + real * inputs.blocks;
    }
    const auto* const data = static_cast<const std::byte*>(w_.data);
    for (int64_t u = 0; u < kUnits; ++u) units_[u] = UnitWords(data, tile_stride_, UnitOf(u));
  }

  HWY_NOINLINE void Run() const {
    const int64_t padded = w_.padded_in();
    VF sums[kRows * kUnits];
    Unrolled<kRows * kUnits>([&](auto i) FRAMEQUILT_INLINE { sums[i] = hn::Zero(DF()); });
    // Counted: a division for every span takes as long as some of its products.
    int64_t span = 0, block = 0, group = 0, group_end = w_.group;
    for (int64_t begin = 0; begin < w_.in; begin += inputs_.span, ++span) {
      if (begin == group_end) {
        ++group;
        group_end += w_.group;
      }
      const int64_t end = std::min(begin + inputs_.span, padded);
      VI totals[kRows * kUnits];
      if constexpr (kLongPairs) {
        PairProducts(begin, end, block, totals);
      } else {
        Products(begin, end, totals);
      }
      Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
        const SpanNumbers numbers = LoadSpan(w_, UnitOf(u), group);
        Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
          VF& sum = sums[r * kUnits + u];
          sum = AddSpan(sum, totals[r * kUnits + u], numbers, sums_[r][span]);
        });
      });
    }
    Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
      if (r >= rows_) return;
      Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
        VF& sum = sums[r * kUnits + u];
        sum = ScaledSum(args_, inputs_, row_ + r, UnitOf(u) * kLanes, sum);
      });
      FinishUnits<kUnits>(args_, row_ + r, unit_, count_, sums + r * kUnits);
    });
  }

 private:
  static constexpr int kPlanes = kDotPlanes<kBits>;
  // Several rows whose sums would not all fit the registers twice, in int16 and int32.
  static constexpr bool kLongPairs = kRows > 1 && !kManySums;

  HWY_INLINE int64_t UnitOf(int64_t u) const { return unit_ + std::min(u, count_ - 1); }

  HWY_INLINE void Prefetch(int64_t input, int64_t u) const {
    constexpr int64_t kBytes = SuperblockBytes(kBits) / 2;
    const auto half = static_cast<uint64_t>(input) / kHalfInputs;  // unsigned: a shift
    PrefetchUnit<kUnits, kBytes>(units_[u], tile_stride_, static_cast<int64_t>(half) * kBytes);
  }
  HWY_INLINE void Load(int64_t input, int64_t u, VU (&words)[kHalfWords]) const {
    LoadCodes<kBits>(units_[u] + PlaceOf(input), static_cast<int>(input / kHalfInputs % 2),
                     tile_stride_, 0, words);
  }

  // How far from a tile's beginning the superblock of an input lies.
  static HWY_INLINE int64_t PlaceOf(int64_t input) {
    return static_cast<int64_t>(static_cast<uint64_t>(input) / 32) * SuperblockBytes(kBits);
  }

  // Adds the products of all units with inputs i.., one half of the superblock at `at`.
  HWY_INLINE void AddHalf(int64_t i, int64_t at, int half, const int8_t* (&x)[kRows],
                          DotSum<kPlanes>* dots) const {
    constexpr int kPeriod = kDotPeriod<kBits>;
    Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
      VU words[kHalfWords];
      LoadCodes<kBits>(units_[u] + at, half, tile_stride_, 0, words);
      // 16 registers do not keep the inputs of several rows from one unit to the next: the
      // compiler would, in memory (13 % slower than reading them again).
      if constexpr (!kManyRegisters && kRows > 1 && u > 0)
        Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE { __asm__("" : "+r"(x[r])); });
      Unrolled<kHalfWords>([&](auto j) FRAMEQUILT_INLINE {
        VU planes[kPlanes];
        CutPlanes<kBits>(words[j], planes);
        Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
          DotSum<kPlanes>& dot = dots[r * kUnits + u];
          dot.Add(planes, FourInputs(x[r] + i + 4 * j));
          if constexpr (kPeriod < kHalfWords && (j + 1) % kPeriod == 0 && j + 1 < kHalfWords)
            dot.Flush();
        });
      });
    });
  }

  HWY_INLINE void Products(int64_t begin, int64_t end, VI* totals) const {
    constexpr int kPeriod = kDotPeriod<kBits>;
    static_assert(kHalfWords % kPeriod == 0 || kPeriod == 2 * kHalfWords);
    const int8_t* x[kRows];
    Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE { x[r] = x_[r]; });
    DotSum<kPlanes> dots[kRows * kUnits];
    Unrolled<kRows * kUnits>([&](auto k) FRAMEQUILT_INLINE { dots[k].Start(); });
    const auto flush = [&]() FRAMEQUILT_INLINE {
      Unrolled<kRows * kUnits>([&](auto k) FRAMEQUILT_INLINE { dots[k].Flush(); });
    };
    int64_t i = begin;
    const auto add_one_half = [&]() FRAMEQUILT_INLINE {
      if constexpr (!kOneStream<kRows>)
        Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE { Prefetch(i, u); });
      AddHalf(i, PlaceOf(i), static_cast<int>(i / kHalfInputs % 2), x, dots);
      i += kHalfInputs;
    };
    if constexpr (kOneStream<kRows>) {
      // Whole superblocks: nothing about their halves is left to be computed. Only a group of 16
      // inputs is a half.
      for (; i + 32 <= end; i += 32) {
        const int64_t at = PlaceOf(i);
        AddHalf(i, at, 0, x, dots);
        if constexpr (kPeriod <= kHalfWords) flush();
        AddHalf(i + kHalfInputs, at, 1, x, dots);
        flush();
      }
      if (i < end) {
        add_one_half();
        flush();
      }
    } else {
      constexpr int64_t kFlush = std::max(kPeriod, kHalfWords) * 4;  // inputs
      while (i < end) {
        const int64_t stop = std::min(end, i + kFlush);
        while (i < stop) add_one_half();
        flush();
      }
    }
    Unrolled<kRows * kUnits>([&](auto k) FRAMEQUILT_INLINE { totals[k] = dots[k].Total(); });
  }

#if !FRAMEQUILT_DIRECT_DOT
  // Pair sums stay in int16 as long as the inputs allow, in most models for a whole block; only
  // they are in registers. Two of them to a row: of two units, or of two planes.
  HWY_INLINE void PairProducts(int64_t begin, int64_t end, int64_t& block, VI* totals) const {
    static_assert(kUnits * kPlanes == 2);
    const int8_t* x[kRows];
    Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE { x[r] = x_[r]; });
    Unrolled<kRows * kUnits>([&](auto i) FRAMEQUILT_INLINE { totals[i] = hn::Zero(DI()); });
    for (int64_t i = begin; i < end; ++block) {
      const int64_t block_end = std::min(end, i + inputs_.block);
      int64_t period = kPairBlock / 4;
      Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
        period = std::min<int64_t>(period, periods_[r][block]);
      });
      if constexpr (kDotPeriod<kBits> < kHalfWords) {
        if (period < kHalfWords) {
          VI more[kRows * kUnits];
          Products(i, block_end, more);
          Unrolled<kRows * kUnits>(
              [&](auto k) FRAMEQUILT_INLINE { totals[k] = hn::Add(totals[k], more[k]); });
          i = block_end;
        }
      }
      while (i < block_end) {
        const int64_t flush = std::min(block_end, i + 4 * period);
        VS part[kRows * 2];
        Unrolled<kRows * 2>([&](auto k) FRAMEQUILT_INLINE { part[k] = hn::Zero(DS()); });
        for (; i < flush; i += kHalfInputs) {
          VU words[kUnits][kHalfWords];
          Unrolled<kUnits>([&](auto u) FRAMEQUILT_INLINE {
            Prefetch(i, u);
            Load(i, u, words[u]);
          });
          Unrolled<kHalfWords>([&](auto j) FRAMEQUILT_INLINE {
            VU both[2];
            if constexpr (kPlanes == 2) {
              CutPlanes<kBits>(words[0][j], both);
            } else {
              both[0] = words[0][j];
              both[1] = words[kUnits - 1][j];
            }
            Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
              AddPairProducts(both[0], both[1], x[r] + i + 4 * j, part[2 * r], part[2 * r + 1]);
            });
          });
        }
        Unrolled<kRows * 2>([&](auto k) FRAMEQUILT_INLINE {
          VI& total = totals[k / kPlanes];
          total = AddPairs < kPlanes == 2 && k % 2 == 1 ? 16 : 1 > (total, part[k]);
        });
      }
    }
  }
#endif

  const ops::LinearArgs& args_;
  const Inputs& inputs_;
  const LinearWeights& w_;
  const int64_t tile_stride_;
  const int64_t row_, rows_, unit_, count_;
  const std::byte* units_[kUnits];  // where the codes of each begin
  // Of each row.
  const int8_t* x_[kRows];
  const float* sums_[kRows];
  const uint8_t* periods_[kRows];  // kLongPairs
};

// --- A tile after the other ----------------------------------------------------------------------

#if FRAMEQUILT_TILE_STREAM

template <int kBits>
void StreamTiles(const ops::LinearArgs& args, const Inputs& inputs, int64_t unit, int64_t count) {
  const auto tile_sums = TileSumsFor<kBits>(*args.w);
  VF sums[kStreamStep];
  Unrolled<kStreamStep>([&](auto u) FRAMEQUILT_INLINE { sums[u] = hn::Zero(DF()); });
  for (int64_t u = 0; u < count; ++u) {
    const int64_t tile = (unit + u) * kTilesPerUnit;
    const auto low = tile_sums(*args.w, inputs, tile);
    const auto high = tile_sums(*args.w, inputs, tile + 1);
    sums[u] = ScaledSum(args, inputs, 0, tile * kTileRows, hn::Combine(DF(), high, low));
  }
  FinishUnits<kStreamStep>(args, 0, unit, count, sums);
}

#endif

// As many units as keep enough sums in flight and fit the registers.
template <int kBits, int kRows>
constexpr int kStreamUnits = kOneStream<kRows> ? 1
                             : kRows == 1      ? 4
                             : !kManySums      ? 2 / kDotPlanes<kBits>
                             : kRows <= 4      ? 2
                                               : 1;

template <int kBits, int kRows>
void IntegerStreamRows(const ops::LinearArgs& args, const Inputs& inputs, int64_t row, int64_t rows,
                       int64_t unit, int64_t count) {
  constexpr int kUnits = kStreamUnits<kBits, kRows>;
  for (int64_t u = 0; u < count; u += kUnits) {
    StreamTile<kBits, kRows, kUnits>(args, inputs, row, rows, unit + u,
                                     std::min<int64_t>(kUnits, count - u))
        .Run();
  }
}

// Rows go in blocks; those after the first find the step's weights in cache.
template <int kBits>
void IntegerStream(const ops::LinearArgs& args, const Inputs& inputs, ThreadPool& pool) {
  constexpr int kMost = kManySums ? 8 : 4;
  const auto run = args.rows == 1   ? &IntegerStreamRows<kBits, 1>
                   : args.rows == 2 ? &IntegerStreamRows<kBits, 2>
                   : args.rows <= 4 ? &IntegerStreamRows<kBits, 4>
                                    : &IntegerStreamRows<kBits, kMost>;
#if FRAMEQUILT_TILE_STREAM
  const int64_t at_once = args.rows == 1 ? 1 : kStreamStep;
#else
  constexpr int64_t at_once = kStreamStep;
#endif
  StreamSteps(args, pool, at_once, [&](const ops::LinearArgs& one, int64_t unit, int64_t count) {
#if FRAMEQUILT_TILE_STREAM
    if (one.rows == 1) return StreamTiles<kBits>(one, inputs, unit, count);
#endif
    for (int64_t row = 0; row < one.rows; row += kMost)
      run(one, inputs, row, std::min<int64_t>(kMost, one.rows - row), unit, count);
  });
}

#endif
}  // namespace FRAMEQUILT_DOT_NAMESPACE
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
