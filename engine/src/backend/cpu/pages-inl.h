// Reading one head of a KV page. Floats become panels of float32 for Gemm: K as [head_dim][64], V
// as [tokens][stride]. Codes become words of two consecutive rows of the page's matrix (two dims of
// K, two tokens of V) for PairDot, as they are: zeros are subtracted from the sums. Included once
// per SIMD target.
#if defined(FRAMEQUILT_CPU_PAGES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_PAGES_INL_H_
#undef FRAMEQUILT_CPU_PAGES_INL_H_
#else
#define FRAMEQUILT_CPU_PAGES_INL_H_
#endif

#include <algorithm>
#include <cstring>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "src/backend/cpu/pairs-inl.h"
#include "src/quant/kv_format.h"
#include "src/quant/number.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

using quant::kPageTokens;
using quant::KvPageLayout;
using quant::KvPart;

constexpr int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A panel somewhere: in scratch, or in the page itself.
struct Panel {
  const float* data = nullptr;
  int64_t stride = 0;
};

HWY_INLINE VU LoadBytes(const uint8_t* at) {
  return hn::PromoteTo(DU(), hn::LoadU(hn::Rebind<uint8_t, DF>(), at));
}

HWY_INLINE VF LoadHalves(const std::byte* at) {
  const hn::Rebind<hwy::float16_t, DF> dh;
  return hn::PromoteTo(DF(), hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(at)));
}

// Bytes that are needed next: a kernel asks for them line by line while it works. A page is too
// short for a hardware prefetcher, and pages of a sequence do not follow each other.
struct Ahead {
  const std::byte* next = nullptr;
  const std::byte* end = nullptr;

  HWY_INLINE void Ask(int64_t lines) {
    for (; lines > 0 && next < end; --lines, next += 64) hwy::Prefetch(next);
  }
  HWY_INLINE void AskAll() {
    for (; next < end; next += 64) hwy::Prefetch(next);
  }
};

// Row of bytes of a plane that row `row` (a multiple of the unit's rows) starts in.
constexpr int64_t PlaneRow(int64_t row, int plane_bits) { return row * plane_bits / 8; }

// --- Codes -------------------------------------------------------------------------------------

// Rows of a matrix of codes that end at a byte border in every plane, at least two, and how the
// codes of two of them are cut out of the bytes that hold them.
template <int kBits>
struct CodeUnit {
  static constexpr quant::KvPlanes kPlanes = quant::kv_planes(kBits);
  static constexpr int kPerLow = 8 / kPlanes.low;
  static constexpr int kRows = std::max(2, kPlanes.high > 0 ? 8 / kPlanes.high : kPerLow);
  static constexpr int kLowRows = kRows / kPerLow;  // rows of bytes of the low plane

  VU low[kLowRows], high;

  // Where a unit's bytes begin in each plane; `row` is a multiple of kRows.
  struct Place {
    const uint8_t* low;
    const uint8_t* high;
    int64_t columns;

    Place(const KvPart& part, const std::byte* head, int64_t row, int64_t column)
        : columns(part.columns) {
      const auto* const bytes = reinterpret_cast<const uint8_t*>(head) + column;
      low = bytes + part.low + PlaneRow(row, kPlanes.low) * columns;
      high = bytes + part.high + PlaneRow(row, kPlanes.high) * columns;
    }
    HWY_INLINE void NextUnit() {
      low += kLowRows * columns;
      high += columns;
    }
  };

  // kLanes columns from `column` of the place on.
  HWY_INLINE void Load(const Place& place, int64_t column) {
    Unrolled<kLowRows>([&](auto i) FRAMEQUILT_INLINE {
      low[i] = LoadBytes(place.low + i * place.columns + column);
    });
    if constexpr (kPlanes.high > 0) high = LoadBytes(place.high + column);
  }

  // Of rows 2 kPair and 2 kPair + 1: no plane but that of 8 bits has them in different bytes.
  template <int kPair>
  HWY_INLINE VU Pair() const {
    constexpr int kFirst = 2 * kPair;
    if constexpr (kBits == 8) {
      return SplitPairs(hn::Or(low[0], hn::ShiftLeft<16>(low[1])));
    } else {
      constexpr int kFrom = kFirst % kPerLow * kPlanes.low;
      VU word = Spread<kPlanes.low, kFrom, 0>(low[kFirst / kPerLow]);
      if constexpr (kPlanes.high > 0)
        word = hn::Or(word, Spread<kPlanes.high, kFirst * kPlanes.high, kPlanes.low>(high));
      return SplitPairs(word);
    }
  }

 private:
  template <int kBy>  // to the left, or to the right where it is negative
  static HWY_INLINE VU Moved(VU word) {
    if constexpr (kBy > 0) return hn::ShiftLeft<kBy>(word);
    if constexpr (kBy < 0) return hn::ShiftRight<-kBy>(word);
    return word;
  }
  // Two fields of kField bits, one behind the other from bit kFrom on, to bit kTo of both halves.
  template <int kField, int kFrom, int kTo>
  static HWY_INLINE VU Spread(VU word) {
    constexpr uint32_t kMask = ((1u << kField) - 1) << kTo;
    const VU both = hn::Or(Moved<kTo - kFrom>(word), Moved<kTo - kFrom + 16 - kField>(word));
    return hn::And(both, hn::Set(DU(), kMask | kMask << 16));
  }
};

// Rows of words that ReadWords writes for a matrix of so many rows.
constexpr int64_t WordRows(int64_t rows) { return RoundUp(rows, 8) / 2; }

// `columns` (a multiple of kLanes) of the first `rows` rows: out [WordRows(rows)][stride]. Codes of
// rows behind the last one and of columns that the page does not have are anything. Asks for as
// many lines as it reads in half of its steps; the products go on with it.
template <int kBits>
void ReadWordsOf(const KvPart& part, const std::byte* head, int64_t rows, int64_t columns,
                 int64_t stride, uint32_t* out, Ahead& ahead) {
  using Unit = CodeUnit<kBits>;
  const int64_t lines = std::max<int64_t>(1, Unit::kRows * kBits * columns / 1024);  // every other
  typename Unit::Place place(part, head, 0, 0);
  for (int64_t row = 0; row < rows; row += Unit::kRows, place.NextUnit()) {
    ahead.Ask(lines);
    for (int64_t c = 0; c < columns; c += kLanes) {
      Unit unit;
      unit.Load(place, c);
      Unrolled<Unit::kRows / 2>([&](auto pair) FRAMEQUILT_INLINE {
        hn::Store(unit.template Pair<pair>(), DU(), out + (row / 2 + pair) * stride + c);
      });
    }
  }
}

// Scales and zeros of one head of a page, [groups][64].
struct PageParams {
  const float* scales = nullptr;
  const int32_t* zeros = nullptr;
};

// Of all 64 tokens; behind the last real one they are anything.
inline PageParams ReadParams(const KvPageLayout& layout, const KvPart& part, const std::byte* head,
                             float* scales, int32_t* zeros) {
  const int64_t count = int64_t{part.groups} * kPageTokens;
  const auto* const bytes = reinterpret_cast<const uint8_t*>(head + part.zeros);
  for (int64_t i = 0; i < count; i += kLanes) {
    const VF scale = layout.format.scale32
                         ? hn::LoadU(DF(), reinterpret_cast<const float*>(head + part.scales) + i)
                         : LoadHalves(head + part.scales + i * 2);
    hn::Store(scale, DF(), scales + i);
    hn::Store(hn::BitCast(DI(), LoadBytes(bytes + i)), DI(), zeros + i);
  }
  return {scales, zeros};
}

// Calls f(integral_constant<bits>) for a part with codes.
template <class F>
HWY_INLINE void WithBits(int bits, const F& f) {
  switch (bits) {
    case 8:
      return f(std::integral_constant<int, 8>());
    case 6:
      return f(std::integral_constant<int, 6>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 3:
      return f(std::integral_constant<int, 3>());
    default:
      return f(std::integral_constant<int, 2>());
  }
}

inline void ReadWords(const KvPart& part, const std::byte* head, int64_t rows, int64_t columns,
                      int64_t stride, uint32_t* out, Ahead& ahead) {
  WithBits(part.bits, [&](auto bits) FRAMEQUILT_INLINE {
    ReadWordsOf<bits>(part, head, rows, columns, stride, out, ahead);
  });
}

// --- Floats ------------------------------------------------------------------------------------

// K of `tokens` tokens (a multiple of kLanes; what lies behind the last real one is never used).
inline Panel ReadK(const KvPart& part, const std::byte* head, int64_t tokens, float* scratch) {
  if (part.bits == 32) return {reinterpret_cast<const float*>(head + part.low), kPageTokens};
  for (int64_t d = 0; d < part.rows; ++d) {
    for (int64_t t = 0; t < tokens; t += kLanes) {
      hn::Store(LoadHalves(head + part.low + (d * kPageTokens + t) * 2), DF(),
                scratch + d * kPageTokens + t);
    }
  }
  return {scratch, kPageTokens};
}

// V of the first `tokens` tokens with rows of `stride` floats (head_dim rounded up to kLanes).
inline Panel ReadV(const KvPart& part, const std::byte* head, int64_t tokens, int64_t stride,
                   float* scratch) {
  const std::byte* const v = head + part.low;
  const int64_t dims = part.columns;
  if (part.bits == 32) {
    if (dims == stride) return {reinterpret_cast<const float*>(v), stride};
    for (int64_t t = 0; t < tokens; ++t) {
      std::memcpy(scratch + t * stride, v + t * dims * 4,
                  static_cast<size_t>(dims) * sizeof(float));
    }
    return {scratch, stride};
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const std::byte* const row = v + t * dims * 2;
    int64_t i = 0;
    for (; i + kLanes <= dims; i += kLanes)
      hn::StoreU(LoadHalves(row + i * 2), DF(), scratch + t * stride + i);
    for (; i < dims; ++i) {
      uint16_t half;
      std::memcpy(&half, row + i * 2, sizeof half);
      scratch[t * stride + i] = quant::float_from_half(half);
    }
  }
  return {scratch, stride};
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
