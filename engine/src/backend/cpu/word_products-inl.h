// The inner products of encoder attention with 8-bit queries and keys. A word of queries and keys
// holds 4 codes where the target has the 4-way dot product, else 2 of 16 bits; values always come
// as pairs of 16 bits. All sums are exact. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_WORD_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_WORD_PRODUCTS_INL_H_
#undef FRAMEQUILT_CPU_WORD_PRODUCTS_INL_H_
#else
#define FRAMEQUILT_CPU_WORD_PRODUCTS_INL_H_
#endif

#include "hwy/highway.h"
#include "src/backend/cpu/integer-inl.h"
#include "src/backend/cpu/pairs-inl.h"
#include "src/ops/integer_attention.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_DOT

inline namespace FRAMEQUILT_DOT_NAMESPACE {

constexpr int kWordRows = kMicroRows;  // broadcast rows of a micro kernel, beside two vectors

// --- Dot products of one word ------------------------------------------------------------------

#if FRAMEQUILT_DIRECT_DOT
constexpr int kWordCodes = 4;
template <int kVectors>
HWY_INLINE void AddWordDots(const VU (&vectors)[kVectors], const uint32_t* word, VI* sums) {
  uint32_t bits;
  __builtin_memcpy(&bits, word, sizeof bits);
  const VU codes = hn::Set(DU(), bits);
  Unrolled<kVectors>([&](auto v)
                         FRAMEQUILT_INLINE { sums[v] = DirectDot(sums[v], vectors[v], codes); });
}
HWY_INLINE VU WordVector(VU words) { return words; }
HWY_INLINE uint32_t KeyWord(const int8_t* codes, int64_t word) {
  uint32_t bits;
  __builtin_memcpy(&bits, codes + 4 * word, sizeof bits);
  return bits;
}
#if FRAMEQUILT_NEON_DOT == 1  // multiplies signed bytes
HWY_INLINE int32_t WordStart(int32_t) { return 0; }
HWY_INLINE uint32_t QueryWord(const int8_t* codes, int64_t word) { return KeyWord(codes, word); }
#else
// The vector operand is unsigned: its codes are 128 larger, and a sum starts that much lower.
HWY_INLINE int32_t WordStart(int32_t sum_of_codes) { return -128 * sum_of_codes; }
HWY_INLINE uint32_t QueryWord(const int8_t* codes, int64_t word) {
  return KeyWord(codes, word) ^ 0x80808080u;
}
#endif
#else
constexpr int kWordCodes = 2;
template <int kVectors>
HWY_INLINE void AddWordDots(const VU (&vectors)[kVectors], const uint32_t* word, VI* sums) {
  AddPairDots(vectors, word, sums);
}
HWY_INLINE VU WordVector(VU words) { return SplitPairs(words); }
HWY_INLINE int32_t WordStart(int32_t) { return 0; }
HWY_INLINE uint32_t KeyWord(const int8_t* codes, int64_t word) {
  const auto half = [&](int64_t i) { return static_cast<uint32_t>(uint16_t(codes[i])); };
  return half(2 * word) | half(2 * word + 1) << 16;
}
HWY_INLINE uint32_t QueryWord(const int8_t* codes, int64_t word) { return KeyWord(codes, word); }
#endif

// ops::probability_code, in the low 16 bits: the sum that rounds it to an integer has it there.
HWY_INLINE VU ProbabilityCode(VF x) {
  using I = ops::IntegerAttention;
  const DF df;
  const DI di;
  const VF inside = hn::Max(x, hn::Set(df, I::kLowest));
  const VF shift = hn::Set(df, Constants::kRoundShift);
  const VF rounded = hn::Add(inside, shift);
  const VF r = hn::Sub(inside, hn::Sub(rounded, shift));
  VF y = hn::MulAdd(hn::Set(df, I::kPower[4]), r, hn::Set(df, I::kPower[3]));
  y = hn::MulAdd(y, r, hn::Set(df, I::kPower[2]));
  y = hn::MulAdd(y, r, hn::Set(df, I::kPower[1]));
  y = hn::MulAdd(y, r, hn::Set(df, I::kPower[0]));
  const VI exponent = hn::ShiftLeft<23>(hn::BitCast(di, rounded));
  const VF power = hn::BitCast(df, hn::Add(hn::BitCast(di, y), exponent));
  return hn::BitCast(DU(), hn::Add(power, shift));
}

#undef FRAMEQUILT_HAVE_FOLD
#if FRAMEQUILT_FOLD && HWY_TARGET == HWY_AVX3_DL
#define FRAMEQUILT_HAVE_FOLD 1

// --- Winograd's inner product of words of 16 bits ------------------------------------------------

// As in winograd-inl.h, the first two words of every four; what a sum of 32 bits overflows by comes
// back when the products that depend on one side alone are taken off.
constexpr int64_t kFoldPeriod = 4;
static_assert(ops::IntegerAttention::kProbabilityOne + ops::IntegerAttention::kValueMost < 1 << 15);

// Calls f(step) for the first of each two folded words.
template <class F>
HWY_INLINE void ForFolded(int64_t steps, const F& f) {
  for (int64_t step = 0; step + 1 < steps; step += kFoldPeriod) f(step);
}

// One row's part of two steps.
HWY_INLINE void AddFoldedDots(const VU (&first)[2], const VU (&second)[2], const uint32_t* word,
                              const uint32_t* next, VI* sums) {
  VI a, b, x, y;
  __asm__(
      "vpbroadcastd %6, %2\n\t"
      "vpbroadcastd %7, %3\n\t"
      "vpaddw %10, %2, %4\n\t"
      "vpaddw %8, %3, %5\n\t"
      "vpdpwssd %5, %4, %0\n\t"
      "vpaddw %11, %2, %2\n\t"
      "vpaddw %9, %3, %3\n\t"
      "vpdpwssd %3, %2, %1"
      : "+v"(sums[0].raw), "+v"(sums[1].raw), "=&v"(a.raw), "=&v"(b.raw), "=&v"(x.raw), "=&v"(y.raw)
      : "m"(*word), "m"(*next), "v"(first[0].raw), "v"(first[1].raw), "v"(second[0].raw),
        "v"(second[1].raw));
}

template <int kRows>
HWY_INLINE void AddFoldedProducts(const WordProducts& p, VI (&acc)[kRows * 2]) {
  const uint32_t* HWY_RESTRICT a = p.a;
  const uint32_t* HWY_RESTRICT b = p.b;
  const int64_t a_row = p.a_row;
  const auto load = [&](VU(&vectors)[2]) FRAMEQUILT_INLINE {
    Unrolled<2>([&](auto v) FRAMEQUILT_INLINE { vectors[v] = hn::Load(DU(), b + v * kLanes); });
    b += p.b_step;
  };
  const auto direct = [&]() FRAMEQUILT_INLINE {
    VU vectors[2];
    load(vectors);
    Unrolled<kRows>([&](auto r)
                        FRAMEQUILT_INLINE { AddPairDots(vectors, a + r * a_row, acc + r * 2); });
    a += p.a_step;
  };
  for (int64_t left = p.steps; left > 0; left -= kFoldPeriod) {
    if (left == 1) return direct();
    VU first[2], second[2];
    load(first);
    load(second);
    Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
      AddFoldedDots(first, second, a + r * a_row, a + p.a_step + r * a_row, acc + r * 2);
    });
    a += 2 * p.a_step;
    if (left > 2) direct();
    if (left > 3) direct();
  }
}
#else
#define FRAMEQUILT_HAVE_FOLD 0
#endif

// --- Micro kernels -----------------------------------------------------------------------------

// Scores of some tokens (rows) with a tile of queries.
struct ScoreBlock {
  WordProducts products;
  const int32_t* starts = nullptr;  // of the sums of each token
  const float* scales = nullptr;
  float* scores = nullptr;  // [tokens][2 kLanes]
  float* most = nullptr;    // [2 kLanes], taken on
};

template <int kRows>
HWY_NOINLINE void ScoreMicro(const ScoreBlock& block) {
  const DF df;
  const DI di;
  VI acc[kRows * 2];
  Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
    acc[2 * r] = acc[2 * r + 1] = hn::Set(di, block.starts[r]);
  });
  AddProducts<kRows, 2>(
      block.products, acc,
      [](const VU(&vectors)[2], const uint32_t* word, VI* sums)
          FRAMEQUILT_INLINE { AddWordDots(vectors, word, sums); },
      []() FRAMEQUILT_INLINE {});
  VF most[2] = {hn::Load(df, block.most), hn::Load(df, block.most + kLanes)};
  Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
    const VF scale = hn::Set(df, block.scales[r]);
    Unrolled<2>([&](auto v) FRAMEQUILT_INLINE {
      const VF score = hn::Mul(hn::ConvertTo(df, acc[2 * r + v]), scale);
      hn::Store(score, df, block.scores + (2 * r + v) * kLanes);
      most[v] = hn::Max(most[v], score);
    });
  });
  hn::Store(most[0], df, block.most);
  hn::Store(most[1], df, block.most + kLanes);
}

// Some channels (rows) of the outputs of a tile of queries, over a span of tokens.
struct ValueBlock {
  WordProducts products;
#if FRAMEQUILT_HAVE_FOLD
  // What sums start with, one number for each channel and one for each query: minus the products of
  // folded words.
  const int32_t* of_channels = nullptr;
  const int32_t* of_queries = nullptr;  // [2 kLanes]
#endif
  float* out = nullptr;  // [channels][2 kLanes]
  bool first = false;    // start from 0 instead of from out
};

template <int kRows>
HWY_NOINLINE void ValueMicro(const ValueBlock& block) {
  const DF df;
  VI acc[kRows * 2];
#if FRAMEQUILT_HAVE_FOLD
  Unrolled<kRows * 2>([&](auto i) FRAMEQUILT_INLINE {
    const VI of_queries = hn::LoadU(DI(), block.of_queries + i % 2 * kLanes);
    acc[i] = hn::Add(of_queries, hn::Set(DI(), block.of_channels[i / 2]));
  });
  AddFoldedProducts<kRows>(block.products, acc);
#else
  Unrolled<kRows * 2>([&](auto i) FRAMEQUILT_INLINE { acc[i] = hn::Zero(DI()); });
  AddPairProducts<kRows, 2>(block.products, acc, []() FRAMEQUILT_INLINE {});
#endif
  Unrolled<kRows * 2>([&](auto i) FRAMEQUILT_INLINE {
    float* const at = block.out + i * kLanes;
    const VF old = block.first ? hn::Zero(df) : hn::Load(df, at);
    hn::Store(hn::Add(old, hn::ConvertTo(df, acc[i])), df, at);
  });
}

// Kernels for 1..kWordRows rows.
template <int... kI>
constexpr std::array<void (*)(const ScoreBlock&), sizeof...(kI)> MakeScoreMicros(
    std::integer_sequence<int, kI...>) {
  return {&ScoreMicro<kI + 1>...};
}
template <int... kI>
constexpr std::array<void (*)(const ValueBlock&), sizeof...(kI)> MakeValueMicros(
    std::integer_sequence<int, kI...>) {
  return {&ValueMicro<kI + 1>...};
}
constexpr auto kScoreMicros = MakeScoreMicros(std::make_integer_sequence<int, kWordRows>());
constexpr auto kValueMicros = MakeValueMicros(std::make_integer_sequence<int, kWordRows>());

}  // namespace FRAMEQUILT_DOT_NAMESPACE

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
