// The two inner products of attention for few rows and KV of 16 bits, straight from the page: a
// vector of halves is widened once and used for all rows while it is in a register. Results equal
// those of panels and Gemm (gemm-inl.h) bit for bit: each output has one accumulator, in the same
// order. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_HALF_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_HALF_PRODUCTS_INL_H_
#undef FRAMEQUILT_CPU_HALF_PRODUCTS_INL_H_
#else
#define FRAMEQUILT_CPU_HALF_PRODUCTS_INL_H_
#endif

#include "hwy/highway.h"
#include "src/backend/cpu/pages-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

// One head of one page and `rows` rows of the tile.
struct HalfProduct {
  const KvPart* part = nullptr;
  const std::byte* head = nullptr;
  const float* a = nullptr;  // scores: q [rows, head_dim]; values: weights [rows, 64]
  int64_t a_stride = 0;
  float* c = nullptr;  // scores [rows, 64], or out [rows, out_stride]
  int64_t c_stride = 0;
  int64_t tokens = 0;
  Ahead* ahead = nullptr;  // goes on from one pass to the next
};

HWY_INLINE VF LoadHalf(const HalfProduct& x, int64_t row, int64_t column) {
  return LoadHalves(x.head + x.part->low + (row * x.part->columns + column) * 2);
}

// Adds the products of kVectors columns of one row of the page's matrix.
template <int kRows, int kVectors>
HWY_INLINE void AddHalves(const HalfProduct& x, const float* a, int64_t row, int64_t column,
                          Ahead& ahead, VF (&acc)[kRows * kVectors]) {
  constexpr int kLines = (kVectors * kLanes * 16 + 511) / 512;  // keeps pace with reading
  ahead.Ask(kLines);
  VF columns[kVectors];
  Unrolled<kVectors>([&](auto v)
                         FRAMEQUILT_INLINE { columns[v] = LoadHalf(x, row, column + v * kLanes); });
  Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
    const VF value = hn::Set(DF(), a[r * x.a_stride]);
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      acc[r * kVectors + v] = hn::MulAdd(value, columns[v], acc[r * kVectors + v]);
    });
  });
}

// dot of kRows rows with all tokens of the page.
template <int kRows, int kVectors>
HWY_NOINLINE void ScoreKernel(const HalfProduct& x) {
  const DF df;
  Ahead ahead = *x.ahead;
  for (int64_t t = 0; t < x.tokens; t += kVectors * kLanes) {
    VF acc[kRows * kVectors];
    Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE { acc[i] = hn::Zero(df); });
    for (int64_t d = 0; d < x.part->rows; ++d)
      AddHalves<kRows, kVectors>(x, x.a + d, d, t, ahead, acc);
    Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE {
      hn::Store(acc[i], df, x.c + i / kVectors * x.c_stride + t + i % kVectors * kLanes);
    });
  }
  *x.ahead = ahead;
}

// c += weights x V over the tokens, for kVectors vectors of columns from `column`.
template <int kRows, int kVectors>
HWY_NOINLINE void ValueKernel(const HalfProduct& x, int64_t column) {
  const DF df;
  Ahead ahead = *x.ahead;
  float* const c = x.c + column;
  VF acc[kRows * kVectors];
  Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE {
    acc[i] = hn::Load(df, c + i / kVectors * x.c_stride + i % kVectors * kLanes);
  });
  for (int64_t t = 0; t < x.tokens; ++t)
    AddHalves<kRows, kVectors>(x, x.a + t, t, column, ahead, acc);
  Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE {
    hn::Store(acc[i], df, c + i / kVectors * x.c_stride + i % kVectors * kLanes);
  });
  *x.ahead = ahead;
}

// Rows that share a widened vector: the query heads of a kv head in most models, so that a page is
// widened once.
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
HWY_INLINE void InPasses(const HalfProduct& x, int64_t rows, const F& f) {
  const int64_t passes = (rows + kProductRows - 1) / kProductRows;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t begin = rows * pass / passes;
    HalfProduct part = x;
    part.a += begin * x.a_stride;
    part.c += begin * x.c_stride;
    f(part, rows * (pass + 1) / passes - begin);
  }
}

inline void ScoresOfHalves(const HalfProduct& x, int64_t rows) {
  InPasses(x, rows, [&](const HalfProduct& part, int64_t count) FRAMEQUILT_INLINE {
    WithRows(count, [&](auto r) FRAMEQUILT_INLINE { ScoreKernel<r, kProductVectors<r>>(part); });
  });
}

inline void ValuesOfHalves(const HalfProduct& x, int64_t rows) {
  const int64_t end = RoundUp(x.part->columns, kLanes);
  InPasses(x, rows, [&](const HalfProduct& part, int64_t count) FRAMEQUILT_INLINE {
    WithRows(count, [&](auto r) FRAMEQUILT_INLINE {
      constexpr int kVectors = kProductVectors<r>;
      int64_t column = 0;
      for (; column + kVectors * kLanes <= end; column += kVectors * kLanes)
        ValueKernel<r, kVectors>(part, column);
      for (; column < end; column += kLanes) ValueKernel<r, 1>(part, column);
    });
  });
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
