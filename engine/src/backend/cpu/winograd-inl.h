// Winograd's inner product (S. Winograd, "A New Algorithm for Inner Product", IEEE Transactions on
// Computers C-17, 1968) for weights of few bits and 8-bit inputs: two products are one and two
// additions, less what depends on a row or on a column alone:
//
//   a0 * w0 + a1 * w1 = (a0 + w1) * (a1 + w0) - a0 * a1 - w0 * w1.
//
// All in integers, hence exact, as long as the sums fit the bytes that are multiplied. It pays
// where a core adds bytes in more units than it multiplies them (four and two: Zen 4 and 5).
//
// Words of 4 inputs go in pairs. Those of every second pair are multiplied so, the first word's
// inputs with the second one's codes; those of the others as they are, or the units that multiply
// would wait for those that add. Of the two factors one is unsigned and one signed, and codes of
// weights below 16 leave 241 values for an input's. In a span (quant::kIntegerSpan) the inputs of
// folded pairs are therefore counted from a number that is below them all, `low`:
//
//   first word: a - low in [0, 240],  second word: a - low - 128 in [-128, 112].
//
// What is left of codes that lie further apart, which few do, is multiplied besides.
#if defined(FRAMEQUILT_CPU_WINOGRAD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_WINOGRAD_INL_H_
#undef FRAMEQUILT_CPU_WINOGRAD_INL_H_
#else
#define FRAMEQUILT_CPU_WINOGRAD_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "src/backend/cpu/integer_inputs-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_DOT && HWY_TARGET == HWY_AVX3_DL
inline namespace winograd {

// Shorter spans would lose at their ends what they gain.
constexpr int64_t kLeastSpan = 64;
constexpr int64_t kPairInputs = 8;                   // of two words
constexpr int64_t kPeriod = 2 * kPairInputs;         // a pair that is folded and one that is not
static_assert(kPeriod == kHalfInputs);               // all that is multiplied are whole periods
static_assert(quant::kIntegerSpan / kPeriod <= 32);  // bits of FoldedSpan::beyond

// `low` is one of few, so that what columns add can be at hand for each: kBaseStep * i - 128 for i
// below kBases. Of codes that fit some window one of these holds all, but for the two widest ranges
// of 4 bits.
template <int kBits>
constexpr int kBaseStep = kBits == 4 ? 3 : 1;
template <int kBits>
constexpr int kBases = kLargestCode<kBits> / kBaseStep<kBits> + 1;
constexpr int kMostBases = 8;
static_assert(kBases<4> <= kMostBases && kBases<3> <= kMostBases && kBases<2> <= kMostBases);

// What the inputs of a row have in a span beside their codes.
struct FoldedSpan {
  int32_t start;    // minus the products of the folded pairs
  float sum;        // of the codes
  uint32_t base;    // i of `low`
  uint32_t beyond;  // bit i: some codes of the i-th folded pair lie beyond the window
};

constexpr int kMicroRows = 5;  // that are multiplied at once
constexpr int64_t kPeriodBytes = kMicroRows * kPeriod;

// What is multiplied of the inputs, in the order in which it is read, so that hardware prefetchers
// can follow: panels of `panel` inputs (whole spans), in each of them groups of kMicroRows rows, in
// these one period of all rows after the other, and likewise one span.
struct FoldedRows {
  int8_t* codes = nullptr;
  FoldedSpan* spans = nullptr;
  int8_t* rest = nullptr;   // what is left of codes beyond their windows: of a row that has any,
  int64_t rest_stride = 0;  // in the order of its inputs
  int64_t rows = 0;         // whole groups
  int64_t inputs = 0;       // whole periods
  int64_t panel = 0, span = 0;

  // Of the panel that begins at input `begin`, of the group that begins at `row`.
  int8_t* Codes(int64_t row, int64_t begin) const {
    return codes + begin * rows + row * std::min(panel, inputs - begin);
  }
  FoldedSpan* Spans(int64_t row, int64_t begin) const {
    return spans + begin / span * rows + row * SpansOfPanel(begin);
  }
  int64_t SpansOfPanel(int64_t begin) const {
    return (std::min(panel, inputs - begin) + span - 1) / span;
  }
};

struct CodeRange {
  int least, most;
};

// Of all bytes, from the least and the greatest of each lane: both at once, as the greatest of ~low
// and of high.
HWY_INLINE CodeRange RangeOfBytes(VB low, VB high) {
  const DB d8;
  const hn::Half<DB> half;
  const auto greatest = [&](VB v) FRAMEQUILT_INLINE {
    return hn::Max(hn::UpperHalf(half, v), hn::LowerHalf(half, v));
  };
  VB m = hn::Combine(d8, greatest(high), greatest(hn::Not(low)));
  const auto take = [&](auto swapped)
                        FRAMEQUILT_INLINE { m = hn::Max(m, hn::BitCast(d8, swapped)); };
  take(hn::SwapAdjacentBlocks(m));
  take(hn::Shuffle1032(hn::BitCast(DI(), m)));
  take(hn::Shuffle2301(hn::BitCast(DI(), m)));
  take(hn::RotateRight<16>(hn::BitCast(DU(), m)));
  take(hn::RotateRight<8>(hn::BitCast(DU(), m)));
  return {~hn::GetLane(m), hn::GetLane(hn::UpperHalf(half, m))};
}

// i of the `low` for codes of a range; the middle one of those that hold them all, or, where none
// does, of those that come nearest.
template <int kBits>
HWY_INLINE int BaseOf(CodeRange range) {
  constexpr int kStep = kBaseStep<kBits>, kLast = kBases<kBits> - 1;
  const int first = (std::max(0, range.most - 127 + kLargestCode<kBits>) + kStep - 1) / kStep;
  const int last = std::min((range.least + 128) / kStep, kLast);
  return first <= last ? std::clamp(kBases<kBits> / 2, first, last)
                       : std::clamp((first + last) / 2, 0, kLast);
}

// Turns the codes of row `row` into what is multiplied, span by span; `sums` are those of the
// spans.
template <int kBits>
HWY_NOINLINE void FoldRow(int8_t* codes, const float* sums, int64_t row, const FoldedRows& to) {
  const int64_t n = to.inputs, span = to.span, lane = row % kMicroRows;
  int8_t* const rest_of_row = to.rest + row * to.rest_stride;
  int8_t* period = nullptr;
  FoldedSpan* of_span = nullptr;
  const DB d8;
  const hn::Repartition<uint64_t, DI> d64;
  constexpr int64_t kBytes = 4 * kLanes;
  const VB folded = hn::BitCast(d8, hn::OddEven(hn::Zero(d64), hn::Set(d64, ~uint64_t{0})));
  for (int64_t begin = 0, s = 0; begin < n; begin += span, ++s) {
    const int64_t count = std::min(span, n - begin);
    int8_t* const x = codes + begin;
    if (begin % to.panel == 0) {
      period = to.Codes(row - lane, begin) + lane * kPeriod;
      of_span = to.Spans(row - lane, begin) + lane;
    }
    const auto for_vectors = [&](const auto& f) FRAMEQUILT_INLINE {
      int64_t i = 0;
      for (; i + kBytes <= count; i += kBytes) f(i, hn::FirstN(d8, kBytes));
      if (i < count) f(i, hn::FirstN(d8, static_cast<size_t>(count - i)));
    };
    // Every window has 0, which stands for the codes that are not folded.
    VB low = hn::Zero(d8), high = low;
    for_vectors([&](int64_t i, auto some) FRAMEQUILT_INLINE {
      const VB v = hn::And(hn::MaskedLoad(some, d8, x + i), folded);
      low = hn::Min(low, v);
      high = hn::Max(high, v);
    });
    const CodeRange range = RangeOfBytes(low, high);
    const int base = BaseOf<kBits>(range);
    const int first = kBaseStep<kBits> * base - 128, last = first + 255 - kLargestCode<kBits>;
    uint32_t beyond = 0;
    if (range.least < first || range.most > last) [[unlikely]] {
      const VB from = hn::Set(d8, static_cast<int8_t>(first));
      const VB until = hn::Set(d8, static_cast<int8_t>(last));
      for_vectors([&](int64_t i, auto some) FRAMEQUILT_INLINE {
        const VB v = hn::MaskedLoad(some, d8, x + i);
        const VB rest = hn::And(hn::Sub(v, hn::Min(hn::Max(v, from), until)), folded);
        hn::BlendedStore(rest, some, d8, rest_of_row + begin + i);
        hn::BlendedStore(hn::Sub(v, rest), some, d8, x + i);
        HWY_ALIGN uint64_t pairs[kBytes / kPairInputs];
        hn::Store(hn::BitCast(d64, rest), d64, pairs);
        for (int64_t p = 0; p < kBytes / kPeriod; ++p)
          beyond |= uint32_t{pairs[2 * p] != 0} << (i / kPeriod + p);
      });
    }
    const uint32_t of_first = static_cast<uint8_t>(-first) * 0x01010101u;
    const uint64_t of_pair = uint64_t{of_first ^ 0x80808080u} << 32 | of_first;
    const VB shift = hn::And(hn::BitCast(d8, hn::Set(d64, of_pair)), folded);
    VI products = hn::Zero(DI());
    for_vectors([&](int64_t i, auto some) FRAMEQUILT_INLINE {
      const VB v = hn::IfThenElseZero(some, hn::Add(hn::MaskedLoad(some, d8, x + i), shift));
      Unrolled<kBytes / kPeriod>([&](auto p) FRAMEQUILT_INLINE {
        if (i + p * kPeriod >= count) return;
        _mm_store_si128(reinterpret_cast<__m128i*>(period + p * kPeriodBytes),
                        _mm512_extracti32x4_epi32(v.raw, p));
      });
      period += std::min(kBytes, count - i) / kPeriod * kPeriodBytes;
      const auto second = hn::ShiftRight<32>(hn::BitCast(d64, hn::And(v, folded)));
      products = DirectDot(products, hn::BitCast(DU(), v), hn::BitCast(DU(), second));
    });
    *of_span = {.start = -hn::GetLane(hn::SumOfLanes(DI(), products)),
                .sum = sums[s],
                .base = static_cast<uint32_t>(base),
                .beyond = beyond};
    of_span += kMicroRows;
  }
}

// What sums of products start with beside FoldedSpan::start: for one vector of columns and each
// base, `stride` apart, as are the words of a span of `inputs`.
template <int kBits>
HWY_INLINE void ColumnStarts(const uint32_t* words, int64_t stride, int64_t inputs,
                             uint32_t* starts) {
  const VU ones = hn::Set(DU(), 0x01010101u);
  VI first_sum = hn::Zero(DI()), second_sum = first_sum, products = first_sum;
  for (int64_t i = 0; i < inputs; i += kPeriod, words += kPeriod / 4 * stride) {
    const VU first = hn::Load(DU(), words), second = hn::Load(DU(), words + stride);
    first_sum = DirectDot(first_sum, first, ones);
    second_sum = DirectDot(second_sum, second, ones);
    products = DirectDot(products, first, second);
  }
  // The products with `low` in first words and with `low` + 128 in second ones.
  VI start = hn::Neg(hn::Add(products, hn::ShiftLeft<7>(first_sum)));
  const VI sum = hn::Add(first_sum, second_sum);
  const VI step = kBaseStep<kBits> == 3 ? hn::Add(sum, hn::Add(sum, sum)) : sum;
  for (int base = 0; base < kBases<kBits>; ++base, starts += stride) {
    hn::Store(hn::BitCast(DU(), start), DU(), starts);
    start = hn::Add(start, step);
  }
}

// A folded pair of words of a row times those of four vectors of columns, added to sums. In
// assembly, because 20 sums beside the operands take all 32 registers.
HWY_INLINE void AddFolded(const int8_t* inputs, const VU (&first)[4], const VU (&second)[4],
                          VI* sums) {
  VI a, b, x, y;
  __asm__(
      "vpbroadcastd %8, %4\n\t"
      "vpbroadcastd %9, %5\n\t"
      "vpaddb %14, %4, %6\n\t"
      "vpaddb %10, %5, %7\n\t"
      "vpdpbusd %7, %6, %0\n\t"
      "vpaddb %15, %4, %6\n\t"
      "vpaddb %11, %5, %7\n\t"
      "vpdpbusd %7, %6, %1\n\t"
      "vpaddb %16, %4, %6\n\t"
      "vpaddb %12, %5, %7\n\t"
      "vpdpbusd %7, %6, %2\n\t"
      "vpaddb %17, %4, %4\n\t"
      "vpaddb %13, %5, %5\n\t"
      "vpdpbusd %5, %4, %3"
      : "+v"(sums[0].raw), "+v"(sums[1].raw), "+v"(sums[2].raw), "+v"(sums[3].raw), "=&v"(a.raw),
        "=&v"(b.raw), "=&v"(x.raw), "=&v"(y.raw)
      : "m"(*reinterpret_cast<const int8_t(*)[4]>(inputs)),
        "m"(*reinterpret_cast<const int8_t(*)[4]>(inputs + 4)), "v"(first[0].raw),
        "v"(first[1].raw), "v"(first[2].raw), "v"(first[3].raw), "v"(second[0].raw),
        "v"(second[1].raw), "v"(second[2].raw), "v"(second[3].raw));
}

}  // namespace winograd
#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
