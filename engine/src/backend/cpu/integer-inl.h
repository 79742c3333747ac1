// The 4-way dot product of unsigned codes and signed inputs that integer linears are made of, on
// every target: each int32 lane gains the sum of its 4 byte products, exactly. Included once per
// SIMD target.
//
// Targets with a dot product instruction (FRAMEQUILT_DIRECT_DOT) add it up in int32 at once. On the
// others a multiply-add gives sums of pairs in int16, and several of these fit in int16 before they
// must be widened: that halves the work of the usual sequence. Codes that are too wide for the
// instruction are cut into two planes of 4 bits: above 6 bits for pairs, so that none can overflow
// (2 * 63 * 128), and above 7 where the instruction takes signed bytes only.
#if defined(FRAMEQUILT_CPU_INTEGER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_INTEGER_INL_H_
#undef FRAMEQUILT_CPU_INTEGER_INL_H_
#else
#define FRAMEQUILT_CPU_INTEGER_INL_H_
#endif

#include "hwy/highway.h"
#include "src/backend/cpu/amx-inl.h"
#include "src/backend/cpu/extension.h"
#include "src/backend/cpu/pieces-inl.h"

#if HWY_ARCH_X86
#include <immintrin.h>
#elif HWY_ARCH_ARM_A64
#include <arm_neon.h>
#endif

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {

#undef FRAMEQUILT_HAVE_DOT
#if FRAMEQUILT_HAVE_SIMD && (HWY_ARCH_X86 || HWY_ARCH_ARM_A64)
#define FRAMEQUILT_HAVE_DOT 1

#undef FRAMEQUILT_DIRECT_DOT
#if HWY_TARGET == HWY_AVX3_DL || FRAMEQUILT_NEON_DOT || \
    (FRAMEQUILT_AVX2_DOT && HWY_TARGET == HWY_AVX2)
#define FRAMEQUILT_DIRECT_DOT 1
#else
#define FRAMEQUILT_DIRECT_DOT 0
#endif

// What differs between the files of one Highway target needs names of its own.
inline namespace FRAMEQUILT_DOT_NAMESPACE {

#if FRAMEQUILT_DIRECT_DOT

// In assembly, because the targets that Highway enables do not name these instructions. On Arm the
// assembler has to be told; the compiler goes on without them.
HWY_INLINE VI DirectDot(VI sum, VU codes, VU inputs) {
#if FRAMEQUILT_AVX2_DOT
  __asm__(FRAMEQUILT_AVX2_DOT_CODE("vpdpbusd %2, %1, %0")
          : "+x"(sum.raw)
          : "x"(codes.raw), "x"(inputs.raw));
#elif HWY_ARCH_X86
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(codes.raw), "v"(inputs.raw));
#elif FRAMEQUILT_NEON_DOT == 2
  __asm__(".arch armv8.2-a+crypto+i8mm\n\tusdot %0.4s, %1.16b, %2.16b"
          : "+w"(sum.raw)
          : "w"(codes.raw), "w"(inputs.raw));
#else
  __asm__(".arch armv8.2-a+crypto+dotprod\n\tsdot %0.4s, %1.16b, %2.16b"
          : "+w"(sum.raw)
          : "w"(codes.raw), "w"(inputs.raw));
#endif
  return sum;
}

#else

using DS = hn::Repartition<int16_t, DI>;
using VS = hn::Vec<DS>;

// Lane i: the sum of the products of bytes 2i and 2i+1.
HWY_INLINE VS PairProducts(VU codes, VU inputs) {
#if HWY_TARGET == HWY_AVX3
  return VS{_mm512_maddubs_epi16(codes.raw, inputs.raw)};
#elif HWY_TARGET == HWY_AVX2
  return VS{_mm256_maddubs_epi16(codes.raw, inputs.raw)};
#elif HWY_ARCH_X86
  return VS{_mm_maddubs_epi16(codes.raw, inputs.raw)};
#else
  const int8x16_t c = vreinterpretq_s8_u32(codes.raw), x = vreinterpretq_s8_u32(inputs.raw);
  const int16x8_t low = vmull_s8(vget_low_s8(c), vget_low_s8(x));
  const int16x8_t high = vmull_high_s8(c, x);
  return VS{vpaddq_s16(low, high)};
#endif
}

// Keeps the compiler from regrouping a chain of sums: it would hold all products until the end, in
// memory.
HWY_INLINE void KeepInRegister(VS& v) {
#if HWY_ARCH_X86
  __asm__("" : "+v"(v.raw));
#else
  __asm__("" : "+w"(v.raw));
#endif
}

// Adds the pair products of one word of inputs with two of codes.
HWY_INLINE void AddPairProducts(VU codes0, VU codes1, const int8_t* inputs, VS& sum0, VS& sum1) {
#if HWY_TARGET == HWY_AVX2
  // In assembly, because 12 sums beside the operands take all 16 registers: the compiler would
  // reorder the loads and keep some sums in memory.
  VS products, words;
  __asm__(
      "vpbroadcastd %4, %3\n\t"
      "vpmaddubsw %3, %5, %2\n\t"
      "vpmaddubsw %3, %6, %3\n\t"
      "vpaddw %2, %0, %0\n\t"
      "vpaddw %3, %1, %1"
      : "+x"(sum0.raw), "+x"(sum1.raw), "=&x"(products.raw), "=&x"(words.raw)
      : "m"(*reinterpret_cast<const int8_t(*)[4]>(inputs)), "x"(codes0.raw), "x"(codes1.raw));
#else
  uint32_t word;
  __builtin_memcpy(&word, inputs, sizeof word);
  const VU words = hn::Set(DU(), word);
  sum0 = hn::Add(sum0, PairProducts(codes0, words));
  KeepInRegister(sum0);
  sum1 = hn::Add(sum1, PairProducts(codes1, words));
  KeepInRegister(sum1);
#endif
}

// Lane i: a times b in the lanes 2i and 2i+1, added.
HWY_INLINE VI PairsTimes(VS a, VS b) {
#if HWY_TARGET == HWY_AVX3
  return VI{_mm512_madd_epi16(a.raw, b.raw)};
#elif HWY_TARGET == HWY_AVX2
  return VI{_mm256_madd_epi16(a.raw, b.raw)};
#elif HWY_ARCH_X86
  return VI{_mm_madd_epi16(a.raw, b.raw)};
#else
  const int32x4_t low = vmull_s16(vget_low_s16(a.raw), vget_low_s16(b.raw));
  return VI{vpaddq_s32(low, vmull_high_s16(a.raw, b.raw))};
#endif
}

// Lane i: sum + kFactor * (pairs of lanes 2i and 2i+1).
template <int kFactor>
HWY_INLINE VI AddPairs(VI sum, VS pairs) {
#if HWY_ARCH_X86
  return hn::Add(sum, PairsTimes(pairs, hn::Set(DS(), kFactor)));
#else
  const VI wide{vpaddlq_s16(pairs.raw)};
  return hn::Add(sum, kFactor == 1 ? wide : hn::Mul(wide, hn::Set(DI(), kFactor)));
#endif
}

#endif

// Codes of so many bits are multiplied whole.
#if !FRAMEQUILT_DIRECT_DOT
constexpr int kWholeBits = 6;
#elif FRAMEQUILT_NEON_DOT == 1  // signed bytes
constexpr int kWholeBits = 7;
#else
constexpr int kWholeBits = 8;
#endif
// Planes of 4 bits that a word of codes is cut into.
template <int kBits>
constexpr int kDotPlanes = kBits > kWholeBits ? 2 : 1;
// How long sums of products of two inputs may stay in int16, in words of 4 inputs: for so long
// whatever the inputs are ...
template <int kBits>
constexpr int kLargestCode = (1 << (kDotPlanes<kBits> == 2 ? 4 : kBits)) - 1;
template <int kBits>
constexpr int kDotPeriod = FRAMEQUILT_DIRECT_DOT || kLargestCode<kBits> <= 15 ? 8
                           : kLargestCode<kBits> == 31                        ? 4
                                                                              : 2;
static_assert(FRAMEQUILT_DIRECT_DOT ||
              (kDotPeriod<4> * 2 * 15 * 128 <= 32767 && kDotPeriod<5> * 2 * 31 * 128 <= 32767 &&
               kDotPeriod<6> * 2 * 63 * 128 <= 32767));
// ... and longer where the inputs are known to allow it: up to kPairBlock of them, 4i and 4i + 1 in
// one pair sum, 4i + 2 and 4i + 3 in the other. Sums on the way may overflow; the last one is right
// if it fits int16, and it does if neither the positive nor the negative inputs of a pair sum add
// up to more than kMostPairInputs.
constexpr int64_t kPairBlock = 128;
template <int kBits>
constexpr int kMostPairInputs = 32767 / kLargestCode<kBits>;

// One accumulator: kLanes sums. Total() is complete after a Flush().
#if FRAMEQUILT_DIRECT_DOT
template <int kPlanes>
struct DotSum {
  VI sums[kPlanes];

  HWY_INLINE void Start() {
    Unrolled<kPlanes>([&](auto p) FRAMEQUILT_INLINE { sums[p] = hn::Zero(DI()); });
  }
  // codes: kPlanes words.
  HWY_INLINE void Add(const VU* codes, VU inputs) {
    Unrolled<kPlanes>([&](auto p)
                          FRAMEQUILT_INLINE { sums[p] = DirectDot(sums[p], codes[p], inputs); });
  }
  HWY_INLINE void Flush() {}
  HWY_INLINE VI Total() const {
    if constexpr (kPlanes == 1) return sums[0];
    return hn::Add(sums[0], hn::ShiftLeft<4>(sums[kPlanes - 1]));
  }
};
#else
template <int kPlanes>
struct DotSum {
  VI total;
  VS part[kPlanes];

  HWY_INLINE void Start() {
    total = hn::Zero(DI());
    Unrolled<kPlanes>([&](auto p) FRAMEQUILT_INLINE { part[p] = hn::Zero(DS()); });
  }
  // codes: kPlanes words.
  HWY_INLINE void Add(const VU* codes, VU inputs) {
    Unrolled<kPlanes>([&](auto p) FRAMEQUILT_INLINE {
      part[p] = hn::Add(part[p], PairProducts(codes[p], inputs));
    });
  }
  HWY_INLINE void Flush() {
    Unrolled<kPlanes>([&](auto p) FRAMEQUILT_INLINE {
      total = AddPairs < p == 0 ? 1 : 16 > (total, part[p]);
      part[p] = hn::Zero(DS());
    });
  }
  HWY_INLINE VI Total() const { return total; }
};
#endif

// A sum that a dot product instruction adds to takes one register instead of two.
constexpr bool kManySums = kManyRegisters || FRAMEQUILT_DIRECT_DOT;

// The planes of a word of codes.
template <int kBits>
HWY_INLINE void CutPlanes(VU word, VU* planes) {
  if constexpr (kDotPlanes<kBits> == 1) {
    planes[0] = word;
  } else {
    planes[0] = MovedBits<4, 0, 0>(word);
    planes[1] = MovedBits<4, 4, 0>(word);
  }
}

// 4 inputs, in every lane.
HWY_INLINE VU FourInputs(const int8_t* inputs) {
  uint32_t word;
  __builtin_memcpy(&word, inputs, sizeof word);
  return hn::Set(DU(), word);
}

}  // namespace FRAMEQUILT_DOT_NAMESPACE

#else
#define FRAMEQUILT_HAVE_DOT 0
#endif

}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
