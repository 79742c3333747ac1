// Quantizes the input rows of an integer linear: the fast version of quant::quantize_row, for all
// rows of a call. Scratch belongs to the engine thread and is kept. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_INTEGER_INPUTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_INTEGER_INPUTS_INL_H_
#undef FRAMEQUILT_CPU_INTEGER_INPUTS_INL_H_
#else
#define FRAMEQUILT_CPU_INTEGER_INPUTS_INL_H_
#endif

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "hwy/highway.h"
#include "src/backend/cpu/integer-inl.h"
#include "src/core/aligned.h"
#include "src/core/thread_pool.h"
#include "src/quant/activations.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_DOT
// Extensions of a target differ in what they need to know of their inputs.
inline namespace FRAMEQUILT_DOT_NAMESPACE {

// At most so many rows take the weights through registers.
constexpr int64_t kIntegerStreamRows = 8;

// The quantized rows of one call: what every output needs.
struct Inputs {
  // [rows, stride], zero from `in` to the padded width; nullptr where they went elsewhere
  const int8_t* codes = nullptr;
  int64_t stride = 0;
  const float* sums = nullptr;  // [rows, spans]: of the codes of each span
  int64_t spans = 0;
  int64_t span = 0;               // inputs of a span
  const float* scales = nullptr;  // [rows]
  const float* zeros = nullptr;   // [rows]
  // [rows, blocks], where products are added up in pairs: after how many words of 4 inputs, an even
  // number, they have to leave int16. A block is a span, or kPairBlock inputs of a longer one.
  const uint8_t* periods = nullptr;
  int64_t blocks = 0, block = 0;
  // [rows], where pair sums are centered: minus the zero, twice in a word. Codes with a zero lie to
  // one side of 0, and few blocks of them fit int16; the differences from it, which are what the
  // inputs are, lie around 0. A kernel that knows the sums of a block's weights takes the products
  // with the zero from the pair sums, where it may overflow, and gives them back in int32. The
  // period of a block is 0 then if its differences do not fit as a whole.
  const uint32_t* minus_zeros = nullptr;
};

struct InputScratch {
  AlignedBuffer<int8_t> codes;
  AlignedBuffer<float> sums, scales, zeros;
  AlignedBuffer<uint8_t> periods;
  AlignedBuffer<uint32_t> minus_zeros;
};

struct Range {
  float low = 0, high = 0;  // with 0 among the values
  bool finite = true;
};

HWY_INLINE Range RangeOf(const float* x, int64_t n) {
  const DF df;
  constexpr int kAtOnce = 2;  // one after the other they would wait for the sum
  VF low[kAtOnce], high[kAtOnce], odd[kAtOnce];
  for (int v = 0; v < kAtOnce; ++v) low[v] = high[v] = odd[v] = hn::Zero(df);
  const auto take = [&](int v, const float* at) FRAMEQUILT_INLINE {
    const VF values = hn::LoadU(df, at);
    low[v] = hn::Min(low[v], values);
    high[v] = hn::Max(high[v], values);
    // 0, or NaN from the first value on that is not finite
    odd[v] = hn::Add(odd[v], hn::Sub(values, values));
  };
  int64_t i = 0;
  for (; i + kAtOnce * kLanes <= n; i += kAtOnce * kLanes)
    Unrolled<kAtOnce>([&](auto v) FRAMEQUILT_INLINE { take(v, x + i + v * kLanes); });
  for (; i + kLanes <= n; i += kLanes) take(0, x + i);
  Range range{hn::GetLane(hn::MinOfLanes(df, hn::Min(low[0], low[1]))),
              hn::GetLane(hn::MaxOfLanes(df, hn::Max(high[0], high[1]))),
              hn::AllTrue(df, hn::Eq(hn::Add(odd[0], odd[1]), hn::Zero(df)))};
  for (; i < n; ++i) {
    range.low = std::min(range.low, x[i]);
    range.high = std::max(range.high, x[i]);
    range.finite = range.finite && x[i] - x[i] == 0.0f;
  }
  return range;
}

using DB = hn::Repartition<int8_t, DI>;
using VB = hn::Vec<DB>;

// Four vectors of integers as one of bytes, in order; what does not fit becomes the nearest byte.
HWY_INLINE VB NarrowToBytes(const VI (&v)[4]) {
#if HWY_ARCH_X86
  // Packing goes by 128 bits, each of which has one word of every vector in the end.
#if HWY_TARGET <= HWY_AVX3
  const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(v[0].raw, v[1].raw),
                                           _mm512_packs_epi32(v[2].raw, v[3].raw));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  // Plain _mm512_permutexvar_epi32 makes GCC warn of what its own header leaves uninitialized.
  return VB{_mm512_maskz_permutexvar_epi32(0xFFFF, order, bytes)};
#elif HWY_TARGET == HWY_AVX2
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0].raw, v[1].raw),
                                           _mm256_packs_epi32(v[2].raw, v[3].raw));
  return VB{_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))};
#else
  return VB{
      _mm_packs_epi16(_mm_packs_epi32(v[0].raw, v[1].raw), _mm_packs_epi32(v[2].raw, v[3].raw))};
#endif
#else
  const int16x8_t low = vqmovn_high_s32(vqmovn_s32(v[0].raw), v[1].raw);
  const int16x8_t high = vqmovn_high_s32(vqmovn_s32(v[2].raw), v[3].raw);
  return VB{vqmovn_high_s16(vqmovn_s16(low), high)};
#endif
}

// Lane i: sum + bytes 4i to 4i + 3.
HWY_INLINE VI AddFourBytes(VI sum, VB bytes) {
  const VU ones = hn::Set(DU(), 0x01010101u);
#if FRAMEQUILT_DIRECT_DOT
  return DirectDot(sum, ones, hn::BitCast(DU(), bytes));
#else
  return AddPairs<1>(sum, PairProducts(ones, hn::BitCast(DU(), bytes)));
#endif
}

// How values of a row become codes, less a base (Inputs::minus_zeros; all in integers: it makes no
// difference where the base is taken off).
class RowCodes {
 public:
  RowCodes(int bits, float scale, int32_t zero, int32_t base)
      : quotient_(scale, static_cast<float>(1 << bits)),
        shift_(zero - base),
        low_(-(1 << (bits - 1)) - base),
        high_((1 << (bits - 1)) - 1 - base) {}

  HWY_INLINE VI operator()(VF x) const {
    const DI di;
    const VI code = hn::Add(quotient_(x), hn::Set(di, shift_));
    return hn::Min(hn::Max(code, hn::Set(di, low_)), hn::Set(di, high_));
  }

  // Writes the codes of a span, which have no base, and returns their sum.
  HWY_INLINE int32_t OfSpan(const float* x, int64_t n, int8_t* codes) const {
    const DF df;
    const DI di;
    const DB d8;
    constexpr int kAtOnce = 4;  // vectors of values: one of codes
    const VI shift = hn::Set(di, shift_);
    const VB low = hn::Set(d8, static_cast<int8_t>(low_));
    const VB high = hn::Set(d8, static_cast<int8_t>(high_));
    VI sum = hn::Zero(di);
    int64_t i = 0;
    for (; i + kAtOnce * kLanes <= n; i += kAtOnce * kLanes) {
      VF values[kAtOnce];
      VI q[kAtOnce];
      Unrolled<kAtOnce>([&](auto v)
                            FRAMEQUILT_INLINE { values[v] = hn::LoadU(df, x + i + v * kLanes); });
      quotient_.Of(values, q);
      Unrolled<kAtOnce>([&](auto v) FRAMEQUILT_INLINE { q[v] = hn::Add(q[v], shift); });
      // Narrowing ends at the least and the greatest code of 8 bits; there may be fewer.
      const VB c = hn::Min(hn::Max(NarrowToBytes(q), low), high);
      hn::StoreU(c, d8, codes + i);
      sum = AddFourBytes(sum, c);
    }
    const hn::Rebind<int8_t, DF> d8_of_vector;
    for (; i + kLanes <= n; i += kLanes) {
      const VI q = (*this)(hn::LoadU(df, x + i));
      hn::StoreU(hn::DemoteTo(d8_of_vector, q), d8_of_vector, codes + i);
      sum = hn::Add(sum, q);
    }
    int32_t rest = 0;
    for (; i < n; ++i) {
      const int32_t q = hn::GetLane((*this)(hn::Set(df, x[i])));
      codes[i] = static_cast<int8_t>(q);
      rest += q;
    }
    return hn::GetLane(hn::SumOfLanes(di, sum)) + rest;
  }

 private:
  RoundedQuotient quotient_;
  int32_t shift_, low_, high_;
};

// Codes of inputs in sequence that are added up in pairs: their sum, and how much the positive and
// the negative ones of each pair sum add up to.
struct InputSums {
  VI positive, sum;
  int32_t rest_sum, rest[2];  // of codes that came alone

  HWY_INLINE void Start() {
    positive = sum = hn::Zero(DI());
    rest_sum = rest[0] = rest[1] = 0;
  }
  HWY_INLINE void Add(VI codes) {
    positive = hn::Add(positive, hn::Max(codes, hn::Zero(DI())));
    sum = hn::Add(sum, codes);
  }
  HWY_INLINE void AddOne(int64_t input, int32_t code) {
    rest[input % 4 / 2] += code > 0 ? code : -code * (1 << 16);
    rest_sum += code;
  }
  HWY_INLINE int32_t Sum() const { return hn::GetLane(hn::SumOfLanes(DI(), sum)) + rest_sum; }
  // Positive codes in the lower half of a word, negative ones in the upper: of kPairBlock inputs
  // they stay below 2^14, centered or not.
  HWY_INLINE void AddPairs(int32_t (&pairs)[2]) const {
    HWY_ALIGN int32_t lanes[kLanes];
    hn::Store(hn::Add(positive, hn::ShiftLeft<16>(hn::Sub(positive, sum))), DI(), lanes);
    for (int i = 0; i < 2; ++i) pairs[i] += rest[i];
    for (int lane = 0; lane < kLanes; ++lane) pairs[lane % 4 / 2] += lanes[lane];
  }
};

// What the periods of rows depend on beside the inputs.
struct PairLimits {
  int most = 0;           // kMostPairInputs of the weights' width
  int safe = 0;           // kDotPeriod
  bool centered = false;  // Inputs::minus_zeros

  // Of sums as AddPairs makes them.
  bool Fit(const int32_t (&pairs)[2]) const {
    const int32_t low = std::max(pairs[0] & 0xFFFF, pairs[1] & 0xFFFF);
    return std::max({low, pairs[0] >> 16, pairs[1] >> 16}) <= most;
  }
};

// The period of one block, from the sums of its quarters or, where those fit anyway, halves.
class BlockPeriod {
 public:
  explicit BlockPeriod(const PairLimits& limits)
      : limits_(limits), part_(limits.safe < 8 ? 8 : 16) {}

  int64_t part_inputs() const { return 4 * part_; }
  void Add(const int32_t (&part)[2], bool half_ends) {
    parts_fit_ = parts_fit_ && limits_.Fit(part);
    for (int i = 0; i < 2; ++i) half_[i] += part[i];
    if (!half_ends) return;
    halves_fit_ = halves_fit_ && limits_.Fit(half_);
    for (int i = 0; i < 2; ++i) block_[i] += std::exchange(half_[i], 0);
  }
  uint8_t Words() const {
    if (limits_.Fit(block_)) return kPairBlock / 4;
    if (limits_.centered) return 0;
    return static_cast<uint8_t>(halves_fit_ ? kPairBlock / 8 : parts_fit_ ? part_ : limits_.safe);
  }

 private:
  const PairLimits& limits_;
  const int part_;  // words
  int32_t half_[2] = {}, block_[2] = {};
  bool parts_fit_ = true, halves_fit_ = true;
};

// The codes of a row with their sums, in blocks whose periods are found.
inline void QuantizeBlocks(const float* x, int64_t n, int64_t span, const RowCodes& code_minus_base,
                           int32_t base, int8_t* codes, float* sums, uint8_t* periods,
                           const PairLimits& limits) {
  const DF df;
  const hn::Rebind<int8_t, DF> d8;
  const VI bases = hn::Set(DI(), base);
  const int64_t block = std::min(span, kPairBlock);
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = std::min(begin + block, n);
    BlockPeriod period(limits);
    int32_t sum = 0;
    for (int64_t i = begin; i < end;) {
      const int64_t part_end = std::min(i + period.part_inputs(), end);
      InputSums inputs;
      inputs.Start();
      for (; i + kLanes <= part_end; i += kLanes) {
        const VI q = code_minus_base(hn::LoadU(df, x + i));
        inputs.Add(q);
        hn::StoreU(hn::DemoteTo(d8, hn::Add(q, bases)), d8, codes + i);
      }
      for (; i < part_end; ++i) {
        const int q = hn::GetLane(code_minus_base(hn::Set(df, x[i])));
        codes[i] = static_cast<int8_t>(q + base);
        inputs.AddOne(i, q);
      }
      sum += inputs.Sum();
      if (i == n) {  // codes behind the last input are 0
        for (int64_t k = n; k % kHalfInputs != 0; ++k) inputs.AddOne(k, -base);
      }
      int32_t of_part[2] = {};
      inputs.AddPairs(of_part);
      period.Add(of_part, (i - begin) % (kPairBlock / 2) == 0 || i == end);
    }
    sum += static_cast<int32_t>(end - begin) * base;
    float& of_span = sums[begin / span];
    of_span = static_cast<float>(sum) + (begin % span == 0 ? 0.0f : of_span);
    *periods++ = period.Words();
  }
}

// What the rows of a call have in common.
struct RowKind {
  int64_t n = 0, padded = 0, span = 0;
  int64_t next = 0;  // from a row to the next one, which is asked for; 0 of a single row
  model::ActivationFormat format;
  PairLimits limits;
};

// Where a row's codes and numbers go (Inputs).
struct RowOutput {
  int8_t* codes = nullptr;
  float *sums = nullptr, *scale = nullptr, *zero = nullptr;
  uint8_t* periods = nullptr;  // kPairs
};

// quant::quantize_row, the sums of the codes of spans, and, with kPairs, the periods of blocks.
template <bool kPairs>
HWY_NOINLINE void QuantizeRow(const float* x, const RowKind& kind, const RowOutput& to) {
  const DF df;
  const int64_t n = kind.n, span = kind.span;
  const model::ActivationFormat format = kind.format;
  const int half = 1 << (format.bits - 1);
  std::memset(to.codes + n, 0, static_cast<size_t>(kind.padded - n));
  const Range range = RangeOf(x, n);
  if (!range.finite) {
    std::memset(to.codes, 0, static_cast<size_t>(n));
    std::fill(to.sums, to.sums + (n + span - 1) / span, 0.0f);
    if constexpr (kPairs) {
      const int64_t block = std::min(span, kPairBlock);
      std::fill(to.periods, to.periods + (n + block - 1) / block, kPairBlock / 4);
    }
    *to.scale = std::numeric_limits<float>::quiet_NaN();
    *to.zero = 0.0f;
    return;
  }
  const float most = static_cast<float>(half - 1);
  float scale, zero = 0.0f;
  if (format.symmetric) {
    scale = std::max(std::max(-range.low, range.high), 1e-5f) / most;
  } else {
    const float levels = static_cast<float>(2 * half - 1);
    scale = std::max(range.high - range.low, 1e-5f) / levels;
    const float wanted = hn::GetLane(hn::Round(hn::Set(df, -range.low / scale)));
    zero = std::min(std::max(wanted, 0.0f), levels) - static_cast<float>(half);
  }
  *to.scale = scale;
  *to.zero = zero;
  const int32_t whole_zero = static_cast<int32_t>(zero);
  if constexpr (!kPairs) {
    const RowCodes code(format.bits, scale, whole_zero, 0);
    float* sum = to.sums;
    for (int64_t begin = 0; begin < n; begin += span) {
      const int64_t count = std::min(span, n - begin);
      if (kind.next != 0) {
        for (int64_t i = begin; i < begin + count; i += 16) __builtin_prefetch(x + kind.next + i);
      }
      *sum++ = static_cast<float>(code.OfSpan(x + begin, count, to.codes + begin));
    }
  } else {
    const int32_t base = kind.limits.centered ? whole_zero : 0;
    const RowCodes code_minus_base(format.bits, scale, whole_zero, base);
    QuantizeBlocks(x, n, span, code_minus_base, base, to.codes, to.sums, to.periods, kind.limits);
  }
}

// Inputs::stride. One of whole pages would put all rows into the same few cache sets.
inline int64_t InputStride(const LinearWeights& w) {
  const int64_t padded = w.padded_in();
  return padded + (padded % 1024 < 64 ? 64 : 0);
}

// Codes of a row that go elsewhere, of this thread.
inline int8_t* OwnRow(int64_t bytes) {
  static thread_local AlignedBuffer<int8_t> own;
  own.reserve(static_cast<size_t>(bytes));
  return own.data();
}

// For weights of kBits bits. after_row(codes, sums, r) is called when those of row r are complete,
// by any thread, and may change the codes. kKeep: they stay, else the next row's take their place.
template <int kBits, bool kKeep, class AfterRow>
Inputs QuantizeInputs(const ops::LinearArgs& args, ThreadPool& pool, const AfterRow& after_row) {
  static thread_local InputScratch own;  // of the engine thread; the pool's threads write to it
  InputScratch& scratch = own;
  const LinearWeights& w = *args.w;
  Inputs inputs;
  const int64_t padded = w.padded_in();
  inputs.stride = InputStride(w);
  inputs.span = std::min<int64_t>(w.group, quant::kIntegerSpan);
  inputs.spans = (w.in + inputs.span - 1) / inputs.span;
  inputs.block = std::min(inputs.span, kPairBlock);
  inputs.blocks = (w.in + inputs.block - 1) / inputs.block;
  const size_t rows = static_cast<size_t>(args.rows);
  if (kKeep)
    scratch.codes.reserve((rows + kSpareRows) * static_cast<size_t>(inputs.stride) + kSpareBytes);
  scratch.sums.reserve((rows + kSpareRows) * static_cast<size_t>(inputs.spans));
  scratch.scales.reserve(rows);
  scratch.zeros.reserve(rows);
  if (!FRAMEQUILT_DIRECT_DOT) scratch.periods.reserve(rows * static_cast<size_t>(inputs.blocks));
  inputs.codes = kKeep ? scratch.codes.data() : nullptr;
  inputs.sums = scratch.sums.data();
  inputs.scales = scratch.scales.data();
  inputs.zeros = scratch.zeros.data();
  inputs.periods = scratch.periods.data();
  // A single row does without periods: all its sums fit the registers twice. Of few rows, weights
  // are read once, and adding them up would take as long as another row.
  const bool pairs = !FRAMEQUILT_DIRECT_DOT && args.rows > 1;
  const bool many = args.rows > kIntegerStreamRows;
  RowKind kind{.n = w.in,
               .padded = padded,
               .span = inputs.span,
               .next = args.rows > 1 ? args.x_stride : 0,
               .format = args.activations};
  kind.limits = {.most = kMostPairInputs<kBits>, .safe = kDotPeriod<kBits>};
  const bool centered = pairs && many && !args.activations.symmetric && inputs.span <= kPairBlock;
  kind.limits.centered = centered;
  if (centered) {
    scratch.minus_zeros.reserve(rows);
    inputs.minus_zeros = scratch.minus_zeros.data();
  }
  const auto quantize_row = pairs ? &QuantizeRow<!FRAMEQUILT_DIRECT_DOT> : &QuantizeRow<false>;
  const auto quantize = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      int8_t* const codes =
          kKeep ? scratch.codes.data() + r * inputs.stride : OwnRow(inputs.stride + kSpareBytes);
      quantize_row(args.x + r * args.x_stride, kind,
                   {.codes = codes,
                    .sums = scratch.sums.data() + r * inputs.spans,
                    .scale = scratch.scales.data() + r,
                    .zero = scratch.zeros.data() + r,
                    .periods = pairs ? scratch.periods.data() + r * inputs.blocks : nullptr});
      if (centered) {
        const auto minus = static_cast<uint16_t>(-static_cast<int32_t>(scratch.zeros[r]));
        scratch.minus_zeros[r] = minus * 0x10001u;
      }
      after_row(codes, scratch.sums.data() + r * inputs.spans, r);
    }
  };
  // Handing out a few kilobytes takes longer than quantizing them.
  constexpr int64_t kWorthSharing = 1 << 15;
  if (args.rows * padded < kWorthSharing || pool.threads() == 1) {
    quantize(0, args.rows);
  } else {
    const int64_t shares = std::min<int64_t>(args.rows, pool.threads());
    pool.parallel_for(shares, [&](int64_t share, int) {
      quantize(args.rows * share / shares, args.rows * (share + 1) / shares);
    });
  }
  return inputs;
}
template <int kBits>
Inputs QuantizeInputs(const ops::LinearArgs& args, ThreadPool& pool) {
  return QuantizeInputs<kBits, true>(args, pool, [](int8_t*, const float*, int64_t) {});
}

}  // namespace FRAMEQUILT_DOT_NAMESPACE
#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
