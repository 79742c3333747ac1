// Exact inner products of 16-bit codes, two to a 32-bit word, for attention: each int32 lane gains
// the products of both halves. Included once per SIMD target.
//
// One operand is a vector of words, the other one word for all lanes. Where the processor has no
// multiply-add of pairs (Arm), a vector has the first codes of all lanes in its lower half and the
// second ones in its upper half instead: PairWord and SplitPairs make it so.
#if defined(FRAMEQUILT_CPU_PAIRS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_PAIRS_INL_H_
#undef FRAMEQUILT_CPU_PAIRS_INL_H_
#else
#define FRAMEQUILT_CPU_PAIRS_INL_H_
#endif

#include "hwy/highway.h"
#include "src/backend/cpu/extension.h"
#include "src/backend/cpu/gemm-inl.h"

#if HWY_ARCH_X86
#include <immintrin.h>
#elif HWY_ARCH_ARM_A64
#include <arm_neon.h>
#endif

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

// Codes of at most 16 bits, signed or not; what lies above them is cut off.
HWY_INLINE VU PairWord(VU first, VU second) {
#if HWY_ARCH_ARM_A64
  return VU{vreinterpretq_u32_u16(vmovn_high_u32(vmovn_u32(first.raw), second.raw))};
#else
  const DU du;
  return hn::Or(hn::And(first, hn::Set(du, 0xFFFFu)), hn::ShiftLeft<16>(second));
#endif
}

// Words whose lower half is the first code, as a vector operand.
HWY_INLINE VU SplitPairs(VU words) {
#if HWY_ARCH_ARM_A64
  return PairWord(words, hn::ShiftRight<16>(words));
#else
  return words;
#endif
}

inline namespace FRAMEQUILT_DOT_NAMESPACE {

// sum + pairs . word
HWY_INLINE VI PairDot(VI sum, VU pairs, VU word) {
#if HWY_TARGET == HWY_AVX3_DL
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum.raw) : "v"(pairs.raw), "v"(word.raw));
  return sum;
#elif HWY_TARGET == HWY_AVX2 && FRAMEQUILT_AVX2_DOT
  __asm__(FRAMEQUILT_AVX2_DOT_CODE("vpdpwssd %2, %1, %0")
          : "+x"(sum.raw)
          : "x"(pairs.raw), "x"(word.raw));
  return sum;
#elif HWY_TARGET == HWY_AVX3
  return hn::Add(sum, VI{_mm512_madd_epi16(pairs.raw, word.raw)});
#elif HWY_TARGET == HWY_AVX2
  return hn::Add(sum, VI{_mm256_madd_epi16(pairs.raw, word.raw)});
#elif HWY_ARCH_X86
  return hn::Add(sum, VI{_mm_madd_epi16(pairs.raw, word.raw)});
#elif HWY_ARCH_ARM_A64
  const int16x8_t codes = vreinterpretq_s16_u32(pairs.raw);
  const int16x4_t both = vreinterpret_s16_u32(vget_low_u32(word.raw));
  const int32x4_t first = vmlal_lane_s16(sum.raw, vget_low_s16(codes), both, 0);
  return VI{vmlal_high_lane_s16(first, codes, both, 1)};
#else
  const DI di;
  const VI a = hn::BitCast(di, pairs), b = hn::BitCast(di, word);
  const VI low =
      hn::Mul(hn::ShiftRight<16>(hn::ShiftLeft<16>(a)), hn::ShiftRight<16>(hn::ShiftLeft<16>(b)));
  return hn::Add(sum, hn::Add(low, hn::Mul(hn::ShiftRight<16>(a), hn::ShiftRight<16>(b))));
#endif
}

// --- Panels ------------------------------------------------------------------------------------

// sums[row][vector] += sum over steps of pairs[step][vector] . words[row][step]. The word of a row
// lies at a[row * a_row + step * a_step].
struct WordProducts {
  const uint32_t* a = nullptr;
  int64_t a_row = 0, a_step = 0;
  const uint32_t* b = nullptr;  // aligned to vectors
  int64_t b_step = 0;
  int64_t steps = 0;
};

// sums[vector] += vectors[vector] . *word
template <int kVectors>
HWY_INLINE void AddPairDots(const VU (&vectors)[kVectors], const uint32_t* word, VI* sums) {
#if HWY_TARGET == HWY_AVX2 && FRAMEQUILT_AVX2_DOT
  // In assembly for the same reason as below.
  if constexpr (kVectors == 2) {
    VU codes;
    __asm__("vpbroadcastd %3, %2\n\t"  //
            FRAMEQUILT_AVX2_DOT_CODE("vpdpwssd %2, %4, %0\n\t")
                FRAMEQUILT_AVX2_DOT_CODE("vpdpwssd %2, %5, %1")
            : "+x"(sums[0].raw), "+x"(sums[1].raw), "=&x"(codes.raw)
            : "m"(*reinterpret_cast<const char(*)[4]>(word)), "x"(vectors[0].raw),
              "x"(vectors[1].raw));
    return;
  }
#elif HWY_TARGET == HWY_AVX2
  // In assembly, because the sums of 6 rows beside the operands take all 16 registers: the compiler
  // would load several words first and keep half of the sums in memory.
  if constexpr (kVectors == 2) {
    VI first, second;
    __asm__(
        "vpbroadcastd %4, %3\n\t"
        "vpmaddwd %3, %5, %2\n\t"
        "vpmaddwd %3, %6, %3\n\t"
        "vpaddd %2, %0, %0\n\t"
        "vpaddd %3, %1, %1"
        : "+x"(sums[0].raw), "+x"(sums[1].raw), "=&x"(first.raw), "=&x"(second.raw)
        : "m"(*reinterpret_cast<const char(*)[4]>(word)), "x"(vectors[0].raw), "x"(vectors[1].raw));
    return;
  }
#endif
  uint32_t bits;
  __builtin_memcpy(&bits, word, sizeof bits);
  const VU codes = hn::Set(DU(), bits);
  Unrolled<kVectors>([&](auto v)
                         FRAMEQUILT_INLINE { sums[v] = PairDot(sums[v], vectors[v], codes); });
}

// add_dots(vectors, word, sums): one row's part of a step. before(): called in every step.
template <int kRows, int kVectors, class AddDots, class Before>
HWY_INLINE void AddProducts(const WordProducts& p, VI (&acc)[kRows * kVectors],
                            const AddDots& add_dots, const Before& before) {
  const DU du;
  const uint32_t* HWY_RESTRICT a = p.a;
  const uint32_t* HWY_RESTRICT b = p.b;
  const int64_t a_row = p.a_row;
  for (int64_t step = 0; step < p.steps; ++step, a += p.a_step, b += p.b_step) {
    before();
    VU vectors[kVectors];
    Unrolled<kVectors>([&](auto v)
                           FRAMEQUILT_INLINE { vectors[v] = hn::Load(du, b + v * kLanes); });
    Unrolled<kRows>(
        [&](auto r) FRAMEQUILT_INLINE { add_dots(vectors, a + r * a_row, acc + r * kVectors); });
  }
}

template <int kRows, int kVectors, class Before>
HWY_INLINE void AddPairProducts(const WordProducts& p, VI (&acc)[kRows * kVectors],
                                const Before& before) {
  AddProducts<kRows, kVectors>(
      p, acc,
      [](const VU(&vectors)[kVectors], const uint32_t* word, VI* sums)
          FRAMEQUILT_INLINE { AddPairDots(vectors, word, sums); },
      before);
}

}  // namespace FRAMEQUILT_DOT_NAMESPACE

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
