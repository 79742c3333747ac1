// Inner products of codes in 32-bit words for attention: sums[r][j] += sum over steps of dot(b[step][j],
// a[r][step]), b in vectors, a broadcast. A word holds 4 codes where the target has the 4-way dot
// product, else 2 codes of 16 bits; values always come as pairs of 16 bits. All sums are exact.
// Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_WORD_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_WORD_PRODUCTS_INL_H_
#undef FRAMEQUILT_CPU_WORD_PRODUCTS_INL_H_
#else
#define FRAMEQUILT_CPU_WORD_PRODUCTS_INL_H_
#endif

#include "hwy/highway.h"
#include "src/backend/cpu/integer-inl.h"
#include "src/ops/integer_attention.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_DOT

inline namespace FRAMEQUILT_DOT_NAMESPACE {

constexpr int kWordRows = kMicroRows;  // broadcast rows of a micro kernel, beside two vectors

// --- Dot products of one word ------------------------------------------------------------------

// Each lane gains the products of its two signed 16-bit halves.
HWY_INLINE VI PairDot(VI sum, VU a, VU b) {
#if HWY_ARCH_X86 && FRAMEQUILT_DIRECT_DOT
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
  return sum;
#elif HWY_TARGET == HWY_AVX3
  return hn::Add(sum, VI{_mm512_madd_epi16(a.raw, b.raw)});
#elif HWY_TARGET == HWY_AVX2
  return hn::Add(sum, VI{_mm256_madd_epi16(a.raw, b.raw)});
#elif HWY_ARCH_X86
  return hn::Add(sum, VI{_mm_madd_epi16(a.raw, b.raw)});
#else
  const int16x8_t x = vreinterpretq_s16_u32(a.raw), y = vreinterpretq_s16_u32(b.raw);
  const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
  return hn::Add(sum, VI{vpaddq_s32(low, vmull_high_s16(x, y))});
#endif
}

#if FRAMEQUILT_DIRECT_DOT
constexpr int kWordCodes = 4;
HWY_INLINE VI WordDot(VI sum, VU vector, VU broadcast) {
  return DirectDot(sum, vector, broadcast);
}
// The vector operand is unsigned: its codes are 128 larger, and a sum starts that much lower.
HWY_INLINE int32_t WordStart(int32_t sum_of_codes) { return -128 * sum_of_codes; }
HWY_INLINE uint32_t SignedWord(const int8_t* codes, int64_t word) {
  uint32_t bits;
  __builtin_memcpy(&bits, codes + 4 * word, sizeof bits);
  return bits;
}
HWY_INLINE uint32_t UnsignedWord(const int8_t* codes, int64_t word) {
  return SignedWord(codes, word) ^ 0x80808080u;
}
#else
constexpr int kWordCodes = 2;
HWY_INLINE VI WordDot(VI sum, VU vector, VU broadcast) { return PairDot(sum, vector, broadcast); }
HWY_INLINE int32_t WordStart(int32_t) { return 0; }
HWY_INLINE uint32_t SignedWord(const int8_t* codes, int64_t word) {
  const auto half = [&](int64_t i) { return static_cast<uint32_t>(uint16_t(codes[i])); };
  return half(2 * word) | half(2 * word + 1) << 16;
}
HWY_INLINE uint32_t UnsignedWord(const int8_t* codes, int64_t word) {
  return SignedWord(codes, word);
}
#endif

// Two codes of at most 16 bits.
HWY_INLINE VU PairWord(VI first, VI second) {
  const DU du;
  const VU low = hn::And(hn::BitCast(du, first), hn::Set(du, 0xFFFFu));
  return hn::Or(low, hn::ShiftLeft<16>(hn::BitCast(du, second)));
}

// ops::probability_code, in the low 16 bits: the sum that rounds it to an integer has it there.
HWY_INLINE VI ProbabilityCode(VF x) {
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
  return hn::BitCast(di, hn::Add(power, shift));
}

// --- Micro kernels -----------------------------------------------------------------------------

struct WordProducts {
  const uint32_t* a = nullptr;
  int64_t a_row = 0, a_step = 0;
  const uint32_t* b = nullptr;  // two vectors a step
  int64_t b_step = 0;
  int64_t steps = 0;
};

template <int kRows, class Dot>
HWY_INLINE void AddProducts(const WordProducts& p, const Dot& dot, VI (&acc)[kRows * 2]) {
  const DU du;
  const uint32_t* HWY_RESTRICT a = p.a;
  const uint32_t* HWY_RESTRICT b = p.b;
  const int64_t a_row = p.a_row;
  for (int64_t step = 0; step < p.steps; ++step, a += p.a_step, b += p.b_step) {
    const VU left = hn::Load(du, b), right = hn::Load(du, b + kLanes);
    Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
      const VU word = hn::Set(du, a[r * a_row]);
      acc[2 * r] = dot(acc[2 * r], left, word);
      acc[2 * r + 1] = dot(acc[2 * r + 1], right, word);
    });
  }
}

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
  AddProducts<kRows>(
      block.products,
      [](VI sum, VU vector, VU word) FRAMEQUILT_INLINE { return WordDot(sum, vector, word); }, acc);
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
  float* out = nullptr;  // [channels][2 kLanes]
  bool first = false;    // start from 0 instead of from out
};

template <int kRows>
HWY_NOINLINE void ValueMicro(const ValueBlock& block) {
  const DF df;
  VI acc[kRows * 2];
  Unrolled<kRows * 2>([&](auto i) FRAMEQUILT_INLINE { acc[i] = hn::Zero(DI()); });
  AddProducts<kRows>(
      block.products,
      [](VI sum, VU vector, VU word) FRAMEQUILT_INLINE { return PairDot(sum, vector, word); }, acc);
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
