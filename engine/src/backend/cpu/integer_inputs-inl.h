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

#include "hwy/highway.h"
#include "src/backend/cpu/integer-inl.h"
#include "src/core/aligned.h"
#include "src/core/thread_pool.h"
#include "src/quant/activations.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_DOT

// The quantized rows of one call: what every output needs.
struct Inputs {
  const int8_t* codes = nullptr;  // [rows, stride], zero from `in` to the padded width
  int64_t stride = 0;
  const float* sums = nullptr;  // [rows, spans]: of the codes of each span
  int64_t spans = 0;
  int64_t span = 0;               // inputs of a span
  const float* scales = nullptr;  // [rows]
  const float* zeros = nullptr;   // [rows]
};

struct InputScratch {
  AlignedBuffer<int8_t> codes;
  AlignedBuffer<float> sums, scales, zeros;
};

struct Range {
  float low = 0, high = 0;  // with 0 among the values
  bool finite = true;
};

HWY_INLINE Range RangeOf(const float* x, int64_t n) {
  const DF df;
  VF low = hn::Zero(df), high = hn::Zero(df), odd = hn::Zero(df);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VF v = hn::LoadU(df, x + i);
    low = hn::Min(low, v);
    high = hn::Max(high, v);
    odd = hn::Add(odd, hn::Sub(v, v));  // 0, or NaN from the first value on that is not finite
  }
  Range range{hn::GetLane(hn::MinOfLanes(df, low)), hn::GetLane(hn::MaxOfLanes(df, high)),
              hn::AllTrue(df, hn::Eq(odd, hn::Zero(df)))};
  for (; i < n; ++i) {
    range.low = std::min(range.low, x[i]);
    range.high = std::max(range.high, x[i]);
    range.finite = range.finite && x[i] - x[i] == 0.0f;
  }
  return range;
}

// quant::quantize_row, and the sums of the codes.
inline HWY_NOINLINE void QuantizeRow(const float* x, int64_t n, int64_t padded, int64_t span,
                                     model::ActivationFormat format, int8_t* codes, float* sums,
                                     float* scale_out, float* zero_out) {
  const DF df;
  const DI di;
  const hn::Rebind<int8_t, DF> d8;
  const int half = 1 << (format.bits - 1);
  std::memset(codes + n, 0, static_cast<size_t>(padded - n));
  const Range range = RangeOf(x, n);
  if (!range.finite) {
    std::memset(codes, 0, static_cast<size_t>(n));
    std::fill(sums, sums + (n + span - 1) / span, 0.0f);
    *scale_out = std::numeric_limits<float>::quiet_NaN();
    *zero_out = 0.0f;
    return;
  }
  const float least = static_cast<float>(-half), most = static_cast<float>(half - 1);
  float scale, zero = 0.0f;
  if (format.symmetric) {
    scale = std::max(std::max(-range.low, range.high), 1e-5f) / most;
  } else {
    const float levels = static_cast<float>(2 * half - 1);
    scale = std::max(range.high - range.low, 1e-5f) / levels;
    const float wanted = hn::GetLane(hn::Round(hn::Set(df, -range.low / scale)));
    zero = std::min(std::max(wanted, 0.0f), levels) - static_cast<float>(half);
  }
  *scale_out = scale;
  *zero_out = zero;
  const VF divisor = hn::Set(df, scale), shift = hn::Set(df, zero);
  const VF low = hn::Set(df, least), high = hn::Set(df, most);
  const auto code = [&](VF v) FRAMEQUILT_INLINE {
    const VF rounded = hn::Add(hn::Round(hn::Div(v, divisor)), shift);
    return hn::ConvertTo(di, hn::Min(hn::Max(rounded, low), high));
  };
  for (int64_t begin = 0; begin < n; begin += span) {
    const int64_t end = std::min(begin + span, n);
    VI sum = hn::Zero(di);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const VI q = code(hn::LoadU(df, x + i));
      sum = hn::Add(sum, q);
      hn::StoreU(hn::DemoteTo(d8, q), d8, codes + i);
    }
    int rest = 0;
    for (; i < end; ++i) {
      const int q = hn::GetLane(code(hn::Set(df, x[i])));
      codes[i] = static_cast<int8_t>(q);
      rest += q;
    }
    sums[begin / span] = static_cast<float>(hn::GetLane(hn::SumOfLanes(di, sum)) + rest);
  }
}

inline Inputs QuantizeInputs(const ops::LinearArgs& args, ThreadPool& pool) {
  static thread_local InputScratch own;  // of the engine thread; the pool's threads write to it
  InputScratch& scratch = own;
  const LinearWeights& w = *args.w;
  Inputs inputs;
  const int64_t padded = w.padded_in();
  // A stride of whole pages would put all rows into the same few cache sets.
  inputs.stride = padded + (padded % 1024 < 64 ? 64 : 0);
  inputs.span = std::min<int64_t>(w.group, quant::kIntegerSpan);
  inputs.spans = (w.in + inputs.span - 1) / inputs.span;
  const size_t rows = static_cast<size_t>(args.rows);
  scratch.codes.reserve(rows * static_cast<size_t>(inputs.stride));
  scratch.sums.reserve(rows * static_cast<size_t>(inputs.spans));
  scratch.scales.reserve(rows);
  scratch.zeros.reserve(rows);
  inputs.codes = scratch.codes.data();
  inputs.sums = scratch.sums.data();
  inputs.scales = scratch.scales.data();
  inputs.zeros = scratch.zeros.data();
  const auto quantize = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      QuantizeRow(args.x + r * args.x_stride, w.in, padded, inputs.span, args.activations,
                  scratch.codes.data() + r * inputs.stride, scratch.sums.data() + r * inputs.spans,
                  scratch.scales.data() + r, scratch.zeros.data() + r);
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

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
