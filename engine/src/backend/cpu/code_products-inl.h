// The two inner products of attention over KV with codes (ops/kv_codes.h): words of a page
// (pages-inl.h) with codes of queries or of weights, exact integers, and what becomes of the sums.
// Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_CODE_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_CODE_PRODUCTS_INL_H_
#undef FRAMEQUILT_CPU_CODE_PRODUCTS_INL_H_
#else
#define FRAMEQUILT_CPU_CODE_PRODUCTS_INL_H_
#endif

#include <cmath>
#include <cstring>

#include "hwy/highway.h"
#include "src/backend/cpu/attention_scratch.h"
#include "src/backend/cpu/math-inl.h"
#include "src/backend/cpu/pages-inl.h"
#include "src/ops/kv_codes.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

// --- Codes of a query and of weights -----------------------------------------------------------

// Codes of a row of one head: groups of words of two dims each, an odd group's last one with a 0,
// and the sum of each group. Returns the number that a score's integer is times.
inline float QueryCodes(const float* q, const KvPart& part, int64_t dims, int16_t* codes,
                        int32_t* sums) {
  const DF df;
  const hn::Rebind<int16_t, DF> d16;
  // f(values, place, lanes) for vectors of [0, n), the last one with 0 behind.
  const auto for_vectors = [&](const float* x, int64_t n, const auto& f) FRAMEQUILT_INLINE {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) f(hn::LoadU(df, x + i), i, kLanes);
    if (i < n) {
      HWY_ALIGN float lanes[kLanes] = {};
      std::memcpy(lanes, x + i, static_cast<size_t>(n - i) * sizeof(float));
      f(hn::Load(df, lanes), i, n - i);
    }
  };
  VF largest = hn::Zero(df), odd = hn::Zero(df);
  for_vectors(q, dims, [&](VF v, int64_t, int64_t) FRAMEQUILT_INLINE {
    largest = hn::Max(largest, hn::Abs(v));
    odd = hn::Add(odd, hn::Sub(v, v));  // 0, or NaN from the first value on that is not finite
  });
  const bool finite = hn::AllTrue(df, hn::Eq(odd, hn::Zero(df)));
  const ops::QueryScale s =
      ops::query_scale(hn::GetLane(hn::MaxOfLanes(df, largest)), finite, part.group);
  const VF to_codes = hn::Set(df, s.to_codes);
  for (int64_t g = 0; g < part.groups; ++g) {
    VI sum = hn::Zero(DI());
    for_vectors(q + g * part.group, part.group, [&](VF v, int64_t i, int64_t n) FRAMEQUILT_INLINE {
      const VI code = finite ? Rounding(hn::Mul(v, to_codes)).Integer() : hn::Zero(DI());
      sum = hn::Add(sum, code);
      const auto narrow = hn::DemoteTo(d16, code);
      if (n == kLanes) {
        hn::StoreU(narrow, d16, codes + i);
      } else {
        HWY_ALIGN int16_t lanes[kLanes];
        hn::Store(narrow, d16, lanes);
        std::memcpy(codes + i, lanes, static_cast<size_t>(n) * sizeof(int16_t));
      }
    });
    codes += part.group;
    if (part.group % 2 != 0) *codes++ = 0;
    *sums++ = hn::GetLane(hn::SumOfLanes(DI(), sum));
  }
  return s.step;
}

// Words of a row of query codes.
constexpr int64_t QueryWords(const KvPart& part) {
  return int64_t{part.groups} * ((part.group + 1) / 2);
}

// Codes of the weights p[t] * scales[t] of a row, [64] with 0 from `tokens` on, and the sum of
// their products with the zeros. Returns what a sum of codes is times.
HWY_INLINE float WeightCodes(const float* p, const float* scales, const int32_t* zeros,
                             int64_t tokens, int16_t* codes, int32_t* zero_sum) {
  constexpr int kVectors = static_cast<int>(kPageTokens) / kLanes;
  const DF df;
  const DI di;
  const hn::Rebind<int16_t, DF> d16;
  VF weights[kVectors];
  VF largest = hn::Zero(df);
  Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
    const int64_t at = v * kLanes, left = tokens - at;
    weights[v] = hn::Zero(df);
    if (left > 0) {
      weights[v] = hn::Mul(hn::Load(df, p + at), hn::Load(df, scales + at));
      if (left < kLanes) {
        const auto real = hn::FirstN(df, static_cast<size_t>(left));
        weights[v] = hn::IfThenElseZero(real, weights[v]);
      }
    }
    largest = hn::Max(largest, weights[v]);
  });
  const ops::WeightScale s = ops::weight_scale(hn::GetLane(hn::MaxOfLanes(df, largest)));
  const VF to_codes = hn::Set(df, s.to_codes);
  VI sum = hn::Zero(di);
  Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
    const VI code = Rounding(hn::Mul(weights[v], to_codes)).Integer();
    hn::StoreU(hn::DemoteTo(d16, code), d16, codes + v * kLanes);
    sum = hn::Add(sum, hn::Mul(code, hn::Load(di, zeros + v * kLanes)));
  });
  *zero_sum = hn::GetLane(hn::SumOfLanes(di, sum));
  return s.step;
}

// Those of all rows of probabilities [rows][64], for the dims of one group, in the scratch.
inline void WeightsOfRows(const float* p, int64_t rows, const PageParams& params, int64_t group,
                          int64_t tokens, AttentionScratch& s) {
  const int64_t at = group * kPageTokens;
  for (int64_t r = 0; r < rows; ++r) {
    const size_t row = static_cast<size_t>(r);
    s.steps[row] = WeightCodes(p + r * kPageTokens, params.scales + at, params.zeros + at, tokens,
                               s.weight_codes.data() + r * kPageTokens, &s.zero_sums[row]);
  }
}

// --- Products ----------------------------------------------------------------------------------

inline namespace FRAMEQUILT_DOT_NAMESPACE {

// Scores of some rows with a page's tokens, over the dims of one group.
struct CodeScores {
  WordProducts products;          // words of the queries with those of K
  const int32_t* sums = nullptr;  // of the queries' codes, a row's lie sums_row apart
  int64_t sums_row = 0;
  const float* scales = nullptr;  // of the tokens
  const int32_t* zeros = nullptr;
  float* c = nullptr;
  int64_t c_stride = 0;
  bool first = false;  // group: instead of adding
  Ahead ahead;

  void NextRows(int64_t rows) {
    products.a += rows * products.a_row;
    sums += rows * sums_row;
    c += rows * c_stride;
  }
  void NextColumns(int64_t columns) {
    products.b += columns;
    scales += columns;
    zeros += columns;
    c += columns;
  }
};

template <int kRows, int kVectors>
HWY_INLINE void StartSums(const CodeScores&, VI (&acc)[kRows * kVectors]) {
  Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE { acc[i] = hn::Zero(DI()); });
}

template <int kRows, int kVectors>
HWY_INLINE void FinishSums(const CodeScores& x, const VI (&acc)[kRows * kVectors]) {
  const DF df;
  const DI di;
  // Copies: stores could change members, for all the compiler knows.
  const float* const scales = x.scales;
  const int32_t* const zeros = x.zeros;
  const int32_t* const sums = x.sums;
  float* const scores = x.c;
  const int64_t sums_row = x.sums_row, c_stride = x.c_stride;
  const auto finish = [&](const auto& store) FRAMEQUILT_INLINE {
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      const VF scale = hn::Load(df, scales + v * kLanes);
      const VI zero = hn::Load(di, zeros + v * kLanes);
      Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
        const VI offset = hn::Mul(zero, hn::Set(di, sums[r * sums_row]));
        const VF dot = hn::ConvertTo(df, hn::Sub(acc[r * kVectors + v], offset));
        store(dot, scale, scores + r * c_stride + v * kLanes);
      });
    });
  };
  if (x.first) {
    finish([](VF dot, VF scale, float* c)
               FRAMEQUILT_INLINE { hn::Store(hn::Mul(dot, scale), DF(), c); });
  } else {
    finish([](VF dot, VF scale, float* c) FRAMEQUILT_INLINE {
      hn::Store(hn::MulAdd(dot, scale, hn::Load(DF(), c)), DF(), c);
    });
  }
}

// Weighted values of some rows over the tokens of a page, for some dims of one group.
struct CodeValues {
  WordProducts products;               // words of the weights with those of V
  const int32_t* zero_sums = nullptr;  // of the rows
  const float* steps = nullptr;
  float* c = nullptr;
  int64_t c_stride = 0;
  Ahead ahead;

  void NextRows(int64_t rows) {
    products.a += rows * products.a_row;
    zero_sums += rows;
    steps += rows;
    c += rows * c_stride;
  }
  void NextColumns(int64_t columns) {
    products.b += columns;
    c += columns;
  }
};

template <int kRows, int kVectors>
HWY_INLINE void StartSums(const CodeValues& x, VI (&acc)[kRows * kVectors]) {
  Unrolled<kRows * kVectors>(
      [&](auto i) FRAMEQUILT_INLINE { acc[i] = hn::Set(DI(), -x.zero_sums[i / kVectors]); });
}

template <int kRows, int kVectors>
HWY_INLINE void FinishSums(const CodeValues& x, const VI (&acc)[kRows * kVectors]) {
  const DF df;
  const float* const steps = x.steps;
  float* const out = x.c;
  const int64_t c_stride = x.c_stride;
  Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
    const VF step = hn::Set(df, steps[r]);
    Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
      float* const c = out + r * c_stride + v * kLanes;
      const VF sum = hn::ConvertTo(df, acc[r * kVectors + v]);
      hn::Store(hn::MulAdd(sum, step, hn::Load(df, c)), df, c);
    });
  });
}

// Lines to ask for in a step, so that all steps ask for as many as a page of 8 bits has.
template <int kVectors>
constexpr int kLinesOfStep = std::max(1, kVectors* kLanes / 32);

// Asks for what is needed next while it multiplies.
template <int kRows, int kVectors>
HWY_INLINE void AddAsking(const WordProducts& products, VI (&acc)[kRows * kVectors], Ahead& asked) {
  Ahead ahead = asked;
  AddPairProducts<kRows, kVectors>(products, acc,
                                   [&]() FRAMEQUILT_INLINE { ahead.Ask(kLinesOfStep<kVectors>); });
  asked = ahead;
}

template <class X, int kRows, int kVectors>
HWY_NOINLINE void CodeKernel(X& x) {
  VI acc[kRows * kVectors];
  StartSums<kRows, kVectors>(x, acc);
  AddAsking<kRows, kVectors>(x.products, acc, x.ahead);
  FinishSums<kRows, kVectors>(x, acc);
}

// Kernels of a kind for 1.. rows.
template <class X, int kVectors, int... kI>
constexpr std::array<void (*)(X&), sizeof...(kI)> MakeCodeKernels(
    std::integer_sequence<int, kI...>) {
  return {&CodeKernel<X, kI + 1, kVectors>...};
}
template <int kVectors>
constexpr int kCodeRows = kVectors == 4 ? kMaxAccumulators / 4 : kMicroRows;
template <class X, int kVectors>
constexpr auto kCodeKernels =
    MakeCodeKernels<X, kVectors>(std::make_integer_sequence<int, kCodeRows<kVectors>>());

// All rows and columns (a multiple of kLanes). Few rows take wide panels, so that enough sums are
// in flight.
template <class X>
void CodeProducts(X& whole, int64_t rows, int64_t columns) {
  X x = whole;
  int64_t vectors = columns / kLanes;
  const auto run = [&]<int kVectors>(std::integral_constant<int, kVectors>) {
    X part = x;
    ForTiles(rows, kCodeRows<kVectors>, [&](int64_t, int64_t count) FRAMEQUILT_INLINE {
      kCodeKernels<X, kVectors>[static_cast<size_t>(count - 1)](part);
      part.NextRows(count);
    });
    x.ahead = part.ahead;
    x.NextColumns(kVectors * kLanes);
    vectors -= kVectors;
  };
  if (rows <= kCodeRows<4>) {
    while (vectors >= 4) run(std::integral_constant<int, 4>());
  }
  while (vectors >= 2) run(std::integral_constant<int, 2>());
  if (vectors > 0) run(std::integral_constant<int, 1>());
  whole.ahead = x.ahead;
}

}  // namespace FRAMEQUILT_DOT_NAMESPACE
#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
