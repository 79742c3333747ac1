// The inner products of integer linears of many rows: a strip of a panel of unpacked weights times
// a few rows of inputs. Included once per SIMD target and extension.
#if defined(FRAMEQUILT_CPU_INTEGER_PANEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_INTEGER_PANEL_INL_H_
#undef FRAMEQUILT_CPU_INTEGER_PANEL_INL_H_
#else
#define FRAMEQUILT_CPU_INTEGER_PANEL_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "src/backend/cpu/integer_stream-inl.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
inline namespace FRAMEQUILT_DOT_NAMESPACE {
#if FRAMEQUILT_HAVE_DOT

constexpr int kIntegerVectors = 2;  // of a micro kernel
constexpr int64_t kIntegerColumns = kIntegerVectors * kLanes;
// Rows whose sums fit the registers beside the operands (SSE4 has no instructions of three).
constexpr int kIntegerMicroRows = kManyRegisters ? 12 : HWY_TARGET == HWY_SSE4 ? 3 : 6;

// Strips of a panel times the same inputs of some rows, added to sums.
struct IntegerBlock {
  const int8_t* x = nullptr;  // [rows, x_stride]
  int64_t x_stride = 0;
  const float* input_sums = nullptr;  // [rows, input_spans], at the panel's first span
  int64_t input_spans = 0;
  const uint32_t* panel = nullptr;
  const float* numbers = nullptr;
  int64_t steps = 0, span_steps = 0;
  const uint8_t* periods = nullptr;  // [rows, input_blocks], at the panel's first block
  int64_t input_blocks = 0, span_blocks = 0, block_steps = 0;
  int64_t safe_steps = 0;  // kDotPeriod
  // Of centered pair sums only: Inputs::minus_zeros, and what is to be multiplied with them, the
  // sums of the codes of each block in the lanes of its pair sums.
  const uint32_t* minus_zeros = nullptr;  // [rows]
  const uint32_t* code_sums = nullptr;    // [blocks, planes, vectors, lanes]
  int64_t tile_bytes = 0;                 // of AMX only
  float* sums = nullptr;                  // [rows, kIntegerSumStride]
  bool first = false;                     // start from 0 instead of from sums
};

// totals[row][vector]: the products of span `span` of a panel, which has the steps [begin, end).
#if FRAMEQUILT_DIRECT_DOT
// Of two planes the high one goes first, so that both share their accumulators.
template <int kPlanes, int kRows, bool>
HWY_INLINE void SpanProducts(const IntegerBlock& b, int64_t, int64_t begin, int64_t end,
                             VI* totals) {
  constexpr int kVectors = kIntegerVectors;
  const int64_t x_stride = b.x_stride;
  Unrolled<kRows * kVectors>([&](auto i) FRAMEQUILT_INLINE { totals[i] = hn::Zero(DI()); });
  Unrolled<kPlanes>([&](auto pass) FRAMEQUILT_INLINE {
    if constexpr (pass > 0) {
      Unrolled<kRows * kVectors>(
          [&](auto i) FRAMEQUILT_INLINE { totals[i] = hn::ShiftLeft<4>(totals[i]); });
    }
    const uint32_t* HWY_RESTRICT words =
        b.panel + (begin * kPlanes + kPlanes - 1 - pass) * kVectors * kLanes;
    const int8_t* HWY_RESTRICT row = b.x + 4 * begin;
    for (int64_t step = begin; step < end; ++step, row += 4) {
      VU codes[kVectors];
      Unrolled<kVectors>([&](auto v)
                             FRAMEQUILT_INLINE { codes[v] = hn::Load(DU(), words + v * kLanes); });
      words += kPlanes * kVectors * kLanes;
      Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
        const VU inputs = FourInputs(row + r * x_stride);
        Unrolled<kVectors>([&](auto v) FRAMEQUILT_INLINE {
          VI& total = totals[r * kVectors + v];
          total = DirectDot(total, codes[v], inputs);
        });
      });
    }
  });
}
#else
// After how many steps the pair sums of a block have to leave int16, for all of kRows rows: periods
// lie `stride` apart.
template <int kRows>
HWY_INLINE int64_t LeastPeriod(const uint8_t* periods, int64_t stride) {
  int least = periods[0];
  for (int r = 1; r < kRows; ++r) least = std::min<int>(least, periods[r * stride]);
  return least;
}

enum class PairStart {
  kZero,      // totals = the products
  kAdd,       // totals += the products
  kCentered,  // totals = the products of a whole block, whose code sums are at `code_sums`
};

// The products of `steps` steps from `begin` on, an even number, whose pair sums fit int16. They
// stay in registers: all vectors at once, or, where codes have two planes, those of one vector
// after the other.
template <int kPlanes, int kRows, PairStart kStart>
HWY_INLINE void PairProductsOf(const IntegerBlock& b, int64_t begin, int64_t steps,
                               const uint32_t* code_sums, VI* totals) {
  constexpr int kVectors = kIntegerVectors;
  static_assert(kVectors == 2 && kPlanes <= 2);
  constexpr int64_t kStepWords = int64_t{kPlanes} * kVectors * kLanes;
  // Between the two words of a step: vectors, or planes of a vector.
  constexpr int64_t kStride = kPlanes == 2 ? kVectors * kLanes : kLanes;
  const int64_t x_stride = b.x_stride;
  Unrolled<kPlanes>([&](auto pass) FRAMEQUILT_INLINE {
    const auto codes_of = [&](auto i) FRAMEQUILT_INLINE {
      return hn::BitCast(DS(), hn::Load(DU(), code_sums + pass * kLanes + i % 2 * kStride));
    };
    const auto minus_zero_of = [&](auto i) FRAMEQUILT_INLINE {
      return hn::BitCast(DS(), hn::Set(DU(), b.minus_zeros[i / 2]));
    };
    VS part[kRows * 2];
    Unrolled<kRows * 2>([&](auto i) FRAMEQUILT_INLINE {
      part[i] = hn::Zero(DS());
      if constexpr (kStart == PairStart::kCentered)
        part[i] =
            hn::Mul(codes_of(i), minus_zero_of(i));  // may overflow, as the sum may until its end
    });
    const uint32_t* HWY_RESTRICT words = b.panel + begin * kStepWords + pass * kLanes;
    const int8_t* HWY_RESTRICT x = b.x + 4 * begin;
    const int8_t* const x_end = x + 4 * steps;
    constexpr int kAtOnce = 2;  // 4 took 8 % longer
    for (; x < x_end; x += 4 * kAtOnce, words += kAtOnce * kStepWords) {
      Unrolled<kAtOnce>([&](auto step) FRAMEQUILT_INLINE {
        const VU first = hn::Load(DU(), words + step * kStepWords);
        const VU second = hn::Load(DU(), words + step * kStepWords + kStride);
        Unrolled<kRows>([&](auto r) FRAMEQUILT_INLINE {
          AddPairProducts(first, second, x + r * x_stride + 4 * step, part[2 * r], part[2 * r + 1]);
        });
      });
    }
    Unrolled<kRows * 2>([&](auto i) FRAMEQUILT_INLINE {
      constexpr int kVector = kPlanes == 2 ? int{pass} : i % 2;
      constexpr int kFactor = kPlanes == 2 && i % 2 == 1 ? 16 : 1;
      constexpr bool kFresh = kStart != PairStart::kAdd && (kPlanes == 1 || i % 2 == 0);
      VI& total = totals[i / 2 * kVectors + kVector];
      total = AddPairs<kFactor>(kFresh ? hn::Zero(DI()) : total, part[i]);
      if constexpr (kStart == PairStart::kCentered) {
        const VI of_zeros = PairsTimes(codes_of(i), minus_zero_of(i));
        total = hn::Sub(total, kFactor == 1 ? of_zeros : hn::ShiftLeft<4>(of_zeros));
      }
    });
  });
}

// The same for the blocks of a span that has several (then none is centered), or does not fit.
template <int kPlanes, int kRows, bool kCentered>
HWY_NOINLINE void PairProductsOfBlocks(const IntegerBlock& b, const uint8_t* periods, int64_t begin,
                                       int64_t end, VI* totals) {
  Unrolled<kRows * kIntegerVectors>([&](auto i) FRAMEQUILT_INLINE { totals[i] = hn::Zero(DI()); });
  for (; begin < end; begin += b.block_steps, ++periods) {
    const int64_t block_end = std::min(begin + b.block_steps, end);
    // Without being centered, as blocks that did not fit are not.
    const int64_t period = kCentered ? b.safe_steps : LeastPeriod<kRows>(periods, b.input_blocks);
    for (int64_t step = begin; step < block_end; step += period) {
      PairProductsOf<kPlanes, kRows, PairStart::kAdd>(b, step, std::min(period, block_end - step),
                                                      nullptr, totals);
    }
  }
}

// As many steps at once as their pair sums allow: in most models all of a block.
template <int kPlanes, int kRows, bool kCentered>
HWY_INLINE void SpanProducts(const IntegerBlock& b, int64_t span, int64_t begin, int64_t end,
                             VI* totals) {
  constexpr PairStart kStart = kCentered ? PairStart::kCentered : PairStart::kZero;
  const uint8_t* const periods = b.periods + span * b.span_blocks;
  if (b.span_blocks == 1 && LeastPeriod<kRows>(periods, b.input_blocks) >= b.block_steps)
      [[likely]] {
    const uint32_t* const code_sums =
        kCentered ? b.code_sums + span * kPlanes * kIntegerColumns : nullptr;
    return PairProductsOf<kPlanes, kRows, kStart>(b, begin, end - begin, code_sums, totals);
  }
  VI sums[kRows * kIntegerVectors];  // `totals` would have to be in memory for both
  PairProductsOfBlocks<kPlanes, kRows, kCentered>(b, periods, begin, end, sums);
  Unrolled<kRows * kIntegerVectors>([&](auto i) FRAMEQUILT_INLINE { totals[i] = sums[i]; });
}
#endif

#endif
}  // namespace FRAMEQUILT_DOT_NAMESPACE
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
