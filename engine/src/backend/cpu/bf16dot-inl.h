// The 2-way dot product of bfloat16 numbers (AVX512_BF16), the weights as pairs of them, and the
// input rows of a call rounded to them. Included once per SIMD target; there is something in it for
// one, whose machines may have the instruction.
#if defined(FRAMEQUILT_CPU_BF16DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_BF16DOT_INL_H_
#undef FRAMEQUILT_CPU_BF16DOT_INL_H_
#else
#define FRAMEQUILT_CPU_BF16DOT_INL_H_
#endif

#include <algorithm>
#include <cstring>

#include "hwy/highway.h"
#include "src/backend/cpu/amx-inl.h"
#include "src/backend/cpu/integer-inl.h"
#include "src/backend/cpu/pieces-inl.h"
#include "src/core/aligned.h"
#include "src/core/thread_pool.h"
#include "src/quant/activations.h"
#include "src/quant/number.h"

#if HWY_ARCH_X86
#include <immintrin.h>
#endif

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {

#undef FRAMEQUILT_HAVE_BF16_DOT
#if FRAMEQUILT_HAVE_SIMD && HWY_TARGET == HWY_AVX3_DL
#define FRAMEQUILT_HAVE_BF16_DOT 1

// Lane i: sum + weight 2i+1 * input 2i+1, then + weight 2i * input 2i, each rounded to float32;
// subnormal operands and results are zeros. In assembly, because the targets that Highway enables
// do not name this instruction.
HWY_INLINE VF PairDot(VF sum, VU weights, VU inputs) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(weights.raw), "v"(inputs.raw));
  return sum;
}

// 2 inputs, in every lane.
HWY_INLINE VU TwoInputs(const uint16_t* inputs) {
  uint32_t word;
  std::memcpy(&word, inputs, sizeof word);
  return hn::Set(DU(), word);
}

// --- Weights as pairs ------------------------------------------------------------------------
//
// A format turns kHalfInputs inputs of a unit into kHalfPairs vectors of pairs. kInOrder: a pair is
// two consecutive inputs; else pairs of 4 inputs are 0 and 2, then 1 and 3, which is how bytes lie
// in 16-bit lanes.

constexpr int kHalfPairs = kHalfInputs / 2;

struct StoredPairs {  // bf16 weights
  static constexpr bool kInOrder = true;
  static constexpr bool kCodes = false;
  static constexpr int64_t kBytesPer32 = int64_t{16} * kBlockBytes;
  static int64_t TileStride(const LinearWeights& w) { return (w.in + 1) / 2 * kBlockBytes; }
  struct Zeros {};
  static HWY_INLINE Zeros LoadZeros(const LinearWeights&, int64_t, int64_t) { return {}; }
  static HWY_INLINE void Load(const LinearWeights& w, int64_t tile_stride, int64_t unit, int64_t i,
                              const Zeros&, VU (&pairs)[kHalfPairs]) {
    const auto* const at = static_cast<const std::byte*>(w.data) + i / 2 * kBlockBytes;
    const int64_t stored = (w.in - i + 1) / 2;  // a tile ends with its last pair
    if (stored >= kHalfPairs) {
      Unrolled<kHalfPairs>([&](auto p) FRAMEQUILT_INLINE {
        pairs[p] = LoadWords(at + p * kBlockBytes, tile_stride, unit);
      });
    } else {
      Unrolled<kHalfPairs>([&](auto p) FRAMEQUILT_INLINE {
        pairs[p] = p < stored ? LoadWords(at + p * kBlockBytes, tile_stride, unit) : hn::Zero(DU());
      });
    }
  }
};

// Affine weights: code - zero, which has at most 8 significant bits and so is exact.
template <int kBits>
struct CodePairs {
  static constexpr bool kInOrder = false;
  static constexpr bool kCodes = true;
  static constexpr int64_t kBytesPer32 = SuperblockBytes(kBits);
  static int64_t TileStride(const LinearWeights& w) { return w.padded_in() / 32 * kBytesPer32; }
  // Differences of 5 bits and a sign less are looked up in a table of 32 numbers.
  static constexpr bool kTable = kBits <= 4;
  struct Zeros {
    VU zero;      // kTable: in both halves of a lane
    VF minus[2];  // else, for CodeMinusZero
  };
  static HWY_INLINE Zeros LoadZeros(const LinearWeights& w, int64_t unit, int64_t group) {
    const VF zero =
        w.offsets != nullptr ? hn::Zero(DF()) : cpu::HWY_NAMESPACE::LoadZeros(w, unit, group);
    Zeros z;
    if constexpr (kTable) {
      const VU low = hn::BitCast(DU(), hn::ConvertTo(hn::RebindToSigned<DU>(), zero));
      z.zero = hn::Or(low, hn::ShiftLeft<16>(low));
    } else {
      Unrolled<2>([&](auto i) FRAMEQUILT_INLINE {
        z.minus[i] = hn::Add(zero, hn::Set(DF(), CodeBase(i * 8)));
      });
    }
    return z;
  }
  static HWY_INLINE void Load(const LinearWeights& w, int64_t tile_stride, int64_t unit, int64_t i,
                              const Zeros& zeros, VU (&pairs)[kHalfPairs]) {
    const auto* const superblock =
        static_cast<const std::byte*>(w.data) + i / 32 * SuperblockBytes(kBits);
    VU words[kHalfWords];
    LoadCodes<kBits>(superblock, static_cast<int>(i / kHalfInputs % 2), tile_stride, unit, words);
    Unrolled<kHalfWords>([&](auto j) FRAMEQUILT_INLINE {
      if constexpr (kTable) {
        pairs[2 * j] = Looked(words[j], zeros.zero);
        pairs[2 * j + 1] = Looked(Bytes13(words[j]), zeros.zero);
      } else {
        const VU high = hn::ShiftRight<16>(words[j]);
        Unrolled<2>([&](auto b) FRAMEQUILT_INLINE {
          pairs[2 * j + b] = Packed(CodeMinusZero<8, 8 * b>(words[j], zeros.minus[b]),
                                    CodeMinusZero<8, 8 * b>(high, zeros.minus[b]));
        });
      }
    });
  }

 private:
  // Exact where the low halves are zero.
  static HWY_INLINE VU Packed(VF low, VF high) {
    return hn::OrAnd(hn::ShiftRight<16>(hn::BitCast(DU(), low)), hn::BitCast(DU(), high),
                     hn::Set(DU(), 0xFFFF0000u));
  }
  static HWY_INLINE VU Bytes13(VU word) { return VU{_mm512_srli_epi16(word.raw, 8)}; }
  // In both halves of a lane: (code - zero) from the low byte. The table is indexed modulo 32, so
  // what the high byte holds does not matter.
  static HWY_INLINE VU Looked(VU codes, VU zero) {
    alignas(64) static constexpr uint16_t kNumbers[32] = {
        0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,   // 0..
        0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,   // 8..
        0xC180, 0xC170, 0xC160, 0xC150, 0xC140, 0xC130, 0xC120, 0xC110,   // -16..
        0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80};  // -8..-1
    const __m512i index = _mm512_sub_epi16(codes.raw, zero.raw);
    return VU{_mm512_permutexvar_epi16(index, _mm512_load_si512(kNumbers))};
  }
};

// --- Inputs ----------------------------------------------------------------------------------

// The rounded rows of one call.
struct RoundedInputs {
  const uint16_t* values = nullptr;  // [rows, stride], in the order of pairs, zero behind `in`
  int64_t stride = 0;
  const float* sums = nullptr;  // [rows, spans], of the inputs of each span; nullptr: not needed
  int64_t spans = 0;
  int64_t span = 0;  // inputs of a span
};

HWY_INLINE VU RoundedBits(VF x) {
  const DU du;
  const VU bits = hn::BitCast(du, x);
  const VU odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
  const VU rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFFu))));
  const VU nan = hn::Or(hn::ShiftRight<16>(bits), hn::Set(du, 0x40u));
  return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(x)), nan, rounded);
}

// quant::round_row, as bits.
template <bool kInOrder>
HWY_NOINLINE void RoundRow(const float* x, int64_t n, int64_t padded, uint16_t* values) {
  const DF df;
  const hn::Rebind<uint16_t, DF> d16;
  // Within 4 values: 0 2 1 3.
  alignas(64) static constexpr uint32_t kPairs[16] = {0, 2,  1, 3,  4,  6,  5,  7,
                                                      8, 10, 9, 11, 12, 14, 13, 15};
  const __m512i pairs = _mm512_load_si512(kPairs);
  const auto rounded = [&](VF v) FRAMEQUILT_INLINE {
    VU bits = RoundedBits(v);
    if constexpr (!kInOrder) bits = VU{_mm512_permutexvar_epi32(pairs, bits.raw)};
    return hn::TruncateTo(d16, bits);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(rounded(hn::LoadU(df, x + i)), d16, values + i);
  if (i < n) {
    const auto some = hn::FirstN(df, static_cast<size_t>(n - i));
    hn::StoreU(rounded(hn::MaskedLoad(some, df, x + i)), d16, values + i);
    i += kLanes;
  }
  if (i < padded) std::memset(values + i, 0, static_cast<size_t>(padded - i) * sizeof(uint16_t));
}

// Sums of the rounded inputs of each span. The order of pairs changes which are added first, not
// which are added.
inline void SumSpans(const uint16_t* values, int64_t n, int64_t padded, int64_t span, float* sums) {
  for (int64_t begin = 0; begin < n; begin += span) {
    float lanes[kHalfInputs] = {};
    const int64_t end = std::min(begin + span, padded);
    for (int64_t i = begin; i < end; i += kHalfInputs) {
      for (int64_t l = 0; l < kHalfInputs; ++l) lanes[l] += quant::float_from_bf16(values[i + l]);
    }
    float sum = 0.0f;
    for (const float lane : lanes) sum += lane;
    sums[begin / span] = sum;
  }
}

struct RoundedScratch {
  AlignedBuffer<uint16_t> values;
  AlignedBuffer<float> sums;
};

inline namespace FRAMEQUILT_DOT_NAMESPACE {

// Inputs of weights that are read up to a multiple of kHalfInputs. Scratch belongs to the engine
// thread and is kept.
template <bool kInOrder>
RoundedInputs RoundInputs(const ops::LinearArgs& args, ThreadPool& pool, int64_t span) {
  static thread_local RoundedScratch own;  // of the engine thread; the pool's threads write to it
  RoundedScratch& scratch = own;
  const LinearWeights& w = *args.w;
  const int64_t padded = w.padded_in();
  RoundedInputs inputs;
  // A stride of whole pages would put all rows into the same few cache sets.
  inputs.stride = padded + (padded % 512 < 32 ? 32 : 0);
  inputs.span = span;
  inputs.spans = (w.in + span - 1) / span;
  const size_t rows = static_cast<size_t>(args.rows);
  scratch.values.reserve((rows + kSpareRows) * static_cast<size_t>(inputs.stride));
  inputs.values = scratch.values.data();
  const bool need_sums = w.offsets != nullptr;
  if (need_sums) {
    scratch.sums.reserve((rows + kSpareRows) * static_cast<size_t>(inputs.spans));
    inputs.sums = scratch.sums.data();
  }
  const auto round = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      uint16_t* const values = scratch.values.data() + r * inputs.stride;
      RoundRow<kInOrder>(args.x + r * args.x_stride, w.in, padded, values);
      if (need_sums) SumSpans(values, w.in, padded, span, scratch.sums.data() + r * inputs.spans);
    }
  };
  // Handing out a few kilobytes takes longer than rounding them.
  constexpr int64_t kWorthSharing = 1 << 15;
  if (args.rows * padded < kWorthSharing || pool.threads() == 1) {
    round(0, args.rows);
  } else {
    const int64_t shares = std::min<int64_t>(args.rows, pool.threads());
    pool.parallel_for(shares, [&](int64_t share, int) {
      round(args.rows * share / shares, args.rows * (share + 1) / shares);
    });
  }
  return inputs;
}

}  // namespace FRAMEQUILT_DOT_NAMESPACE

#else
#define FRAMEQUILT_HAVE_BF16_DOT 0
#endif

}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
