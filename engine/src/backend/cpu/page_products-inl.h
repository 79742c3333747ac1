// The two inner products of attention for few rows, straight from the packed page: a word of codes
// is unpacked once and used for all rows while it is in a register. Results equal those of panels
// and Gemm (gemm-inl.h) bit for bit: each output has one accumulator, in the same order. Included
// once per SIMD target.
#if defined(FRAMEQUILT_CPU_PAGE_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_PAGE_PRODUCTS_INL_H_
#undef FRAMEQUILT_CPU_PAGE_PRODUCTS_INL_H_
#else
#define FRAMEQUILT_CPU_PAGE_PRODUCTS_INL_H_
#endif

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "src/backend/cpu/pages-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

// Bytes that are needed next: a kernel asks for them line by line while it multiplies. A page is
// too short for a hardware prefetcher, and pages of a sequence do not follow each other.
struct Ahead {
  const std::byte* next = nullptr;
  const std::byte* end = nullptr;

  template <int kLines>
  HWY_INLINE void Ask() {
    Unrolled<kLines>([&](auto) FRAMEQUILT_INLINE {
      if (next < end) {
        hwy::Prefetch(next);
        next += 64;
      }
    });
  }
};

// One head of one page and `rows` rows of the tile.
struct PageProduct {
  const KvPart* part = nullptr;
  const std::byte* head = nullptr;
  PageParams params;
  const float* a = nullptr;  // scores: q [rows, head_dim]; values: weights [rows, 64]
  int64_t a_stride = 0;
  float* c = nullptr;  // scores [rows, 64], or out [rows, out_stride]
  int64_t c_stride = 0;
  int64_t tokens = 0;
  int64_t group = 0;
  Ahead* ahead = nullptr;  // goes on from one group and pass to the next
};

// Lines of kVectors vectors of columns of a unit: to ask for so many keeps pace with reading.
template <int kBits, int kVectors, int kUnitRows>
constexpr int kLinesOfUnit = (kUnitRows * kBits * kVectors * kLanes + 511) / 512;

// A vector of columns of the rows that share bytes, as factors.
template <int kBits>
struct RowUnit {
  static constexpr int kRows = CodeUnit<kBits>::kRows;
  static constexpr int kShifts = CodeUnit<kBits>::kPerLow;
  CodeUnit<kBits> unit;

  HWY_INLINE void Load(const KvPart& part, const std::byte* head, int64_t row, int64_t column) {
    constexpr quant::KvPlanes kPlanes = quant::kv_planes(kBits);
    const auto* const bytes = reinterpret_cast<const uint8_t*>(head) + column;
    unit.Load(bytes + part.low + PlaneRow(row, kPlanes.low) * part.columns,
              bytes + part.high + PlaneRow(row, kPlanes.high) * part.columns, part.columns);
  }
  template <int kRow>
  HWY_INLINE VF Get(VF minus) const {
    return unit.template Code<kRow>(minus);
  }
  // What the zero of row kRow has added: see CodeMinusZero.
  static constexpr float Base(int row) { return CodeBase(CodeUnit<kBits>::Shift(row)); }
};

template <>
struct RowUnit<16> {
  static constexpr int kRows = 1, kShifts = 1;
  VF value;

  HWY_INLINE void Load(const KvPart& part, const std::byte* head, int64_t row, int64_t column) {
    value = LoadHalves(head + part.low + (row * part.columns + column) * 2);
  }
  template <int kRow>
  HWY_INLINE VF Get(VF) const {
    return value;
  }
  static constexpr float Base(int) { return 0.0f; }
};

// dot of kRows rows with all tokens of the page, over the dims of one group.
template <int kBits, int kRows, int kVectors>
HWY_NOINLINE void ScoreKernel(const PageProduct& x) {
  using Unit = RowUnit<kBits>;
  const DF df;
  Ahead ahead = *x.ahead;
  const int64_t begin = x.group * x.part->group, end = begin + x.part->group;
  const float* const scales = kBits <= 8 ? x.params.scales + x.group * kPageTokens : nullptr;
  const float* const zeros = kBits <= 8 ? x.params.zeros + x.group * kPageTokens : nullptr;
  for (int64_t t = 0; t < x.tokens; t += kVectors * kLanes) {
    VF acc[kRows * kVectors];
    Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE { acc[i] = hn::Zero(df); });
    VF minus[kVectors * Unit::kShifts];
    if constexpr (kBits <= 8) {
      Unrolled<kVectors * Unit::kShifts>([&](auto i) FRAMEQUILT_INLINE {
        const VF zero = hn::Load(df, zeros + t + i / Unit::kShifts * kLanes);
        minus[i] = hn::Add(zero, hn::Set(df, Unit::Base(i % Unit::kShifts)));
      });
    } else {
      minus[0] = hn::Zero(df);
    }
    const float* a = x.a + begin;
    for (int64_t d = begin; d < end; d += Unit::kRows, a += Unit::kRows) {
      ahead.Ask<kLinesOfUnit<kBits, kVectors, Unit::kRows>>();
      Unit units[kVectors];
      Unrolled<kVectors>(
          [&](auto v) FRAMEQUILT_INLINE { units[v].Load(*x.part, x.head, d, t + v * kLanes); });
      const auto step = [&](auto row) FRAMEQUILT_INLINE {
        constexpr int kRow = decltype(row)::value;
        VF columns[kVectors];
        Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
          constexpr int kMinus =
              kBits <= 8 ? decltype(v)::value * Unit::kShifts + kRow % Unit::kShifts : 0;
          columns[v] = units[v].template Get<kRow>(minus[kMinus]);
        });
        Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
          const VF value = hn::Set(df, a[r * x.a_stride + kRow]);
          Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
            acc[r * kVectors + v] = hn::MulAdd(value, columns[v], acc[r * kVectors + v]);
          });
        });
      };
      if (d + Unit::kRows <= end) {
        Unrolled<Unit::kRows>(step);
      } else {
        Unrolled<Unit::kRows>([&](auto row) FRAMEQUILT_INLINE {
          if (d + row < end) step(row);
        });
      }
    }
    Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE {
      const int64_t at = t + i % kVectors * kLanes;
      float* const c = x.c + i / kVectors * x.c_stride + at;
      VF sum = acc[i];
      if constexpr (kBits <= 8) {
        const VF scale = hn::Load(df, scales + at);
        sum = x.group == 0 ? hn::Mul(sum, scale) : hn::MulAdd(sum, scale, hn::Load(df, c));
      }
      hn::Store(sum, df, c);
    });
  }
  *x.ahead = ahead;
}

// c += weights x V over the tokens, for kVectors vectors of columns from `column`.
template <int kBits, int kRows, int kVectors>
HWY_NOINLINE void ValueKernel(const PageProduct& x, int64_t column) {
  using Unit = RowUnit<kBits>;
  const DF df;
  Ahead ahead = *x.ahead;
  const float* const zeros = kBits <= 8 ? x.params.zeros + x.group * kPageTokens : nullptr;
  float* const c = x.c + column;
  VF acc[kRows * kVectors];
  Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE {
    acc[i] = hn::Load(df, c + i / kVectors * x.c_stride + i % kVectors * kLanes);
  });
  const float* a = x.a;
  for (int64_t t = 0; t < x.tokens; t += Unit::kRows, a += Unit::kRows) {
    ahead.Ask<kLinesOfUnit<kBits, kVectors, Unit::kRows>>();
    Unit units[kVectors];
    Unrolled<kVectors>(
        [&](auto v) FRAMEQUILT_INLINE { units[v].Load(*x.part, x.head, t, column + v * kLanes); });
    const auto step = [&](auto row) FRAMEQUILT_INLINE {
      constexpr int kRow = decltype(row)::value;
      VF minus = hn::Zero(df);
      if constexpr (kBits <= 8) minus = hn::Set(df, zeros[t + kRow] + Unit::Base(kRow));
      VF columns[kVectors];
      Unrolled<kVectors>(
          [&](auto v) FRAMEQUILT_INLINE { columns[v] = units[v].template Get<kRow>(minus); });
      Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
        const VF value = hn::Set(df, a[r * x.a_stride + kRow]);
        Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
          acc[r * kVectors + v] = hn::MulAdd(value, columns[v], acc[r * kVectors + v]);
        });
      });
    };
    if (t + Unit::kRows <= x.tokens) {
      Unrolled<Unit::kRows>(step);
    } else {
      Unrolled<Unit::kRows>([&](auto row) FRAMEQUILT_INLINE {
        if (t + row < x.tokens) step(row);
      });
    }
  }
  Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE {
    hn::Store(acc[i], df, c + i / kVectors * x.c_stride + i % kVectors * kLanes);
  });
  *x.ahead = ahead;
}

// Rows that share an unpacked word: the query heads of a kv head in most models, so that a page is
// unpacked once.
constexpr int kProductRows = kManyRegisters ? 8 : 4;
// Vectors of columns that a kernel for kRows rows holds sums of.
template <int kRows>
constexpr int kProductVectors = (kManyRegisters && kRows <= 4) ? 4 : 2;
static_assert(kPageTokens % (4 * kLanes) == 0);

// Calls f(integral_constant<count>) for the rows of a pass, 1 .. kProductRows.
template <int kMost = kProductRows, class F>
HWY_INLINE void WithRows(int64_t count, const F& f) {
  if constexpr (kMost > 1) {
    if (count < kMost) return WithRows<kMost - 1>(count, f);
  }
  f(std::integral_constant<int, kMost>());
}

// Calls f(part) with at most kProductRows rows of `x` at a time, in even parts.
template <class F>
HWY_INLINE void InPasses(const PageProduct& x, int64_t rows, const F& f) {
  const int64_t passes = (rows + kProductRows - 1) / kProductRows;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t begin = rows * pass / passes;
    PageProduct part = x;
    part.a += begin * x.a_stride;
    part.c += begin * x.c_stride;
    f(part, rows * (pass + 1) / passes - begin);
  }
}

template <int kBits>
void ScoresOfPage(const PageProduct& x, int64_t rows) {
  InPasses(x, rows, [&](PageProduct& part, int64_t count) FRAMEQUILT_INLINE {
    for (part.group = 0; part.group < x.part->groups; ++part.group) {
      WithRows(count,
               [&](auto r) FRAMEQUILT_INLINE { ScoreKernel<kBits, r, kProductVectors<r>>(part); });
    }
  });
}

// The columns of group x.group; weights are already times their scales.
template <int kBits>
void ValuesOfPage(const PageProduct& x, int64_t rows) {
  const int64_t begin = x.group * x.part->group;
  const int64_t end = RoundUp(begin + x.part->group, kLanes);
  InPasses(x, rows, [&](const PageProduct& part, int64_t count) FRAMEQUILT_INLINE {
    WithRows(count, [&](auto r) FRAMEQUILT_INLINE {
      constexpr int kVectors = kProductVectors<r>;
      int64_t column = begin;
      for (; column + kVectors * kLanes <= end; column += kVectors * kLanes)
        ValueKernel<kBits, r, kVectors>(part, column);
      for (; column < end; column += kLanes) ValueKernel<kBits, r, 1>(part, column);
    });
  });
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
