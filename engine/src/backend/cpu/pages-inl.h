// Reading one head of a KV page: codes become the float32 factors (code - zero), exact, that
// quant::kv_read_factors gives, in registers (CodeUnit) or as panels for the inner product: K as
// [head_dim][64], V as [tokens][stride]. Included once per SIMD target.
#if defined(FRAMEQUILT_CPU_PAGES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_PAGES_INL_H_
#undef FRAMEQUILT_CPU_PAGES_INL_H_
#else
#define FRAMEQUILT_CPU_PAGES_INL_H_
#endif

#include <cstring>

#include "hwy/highway.h"
#include "src/backend/cpu/gemm-inl.h"
#include "src/quant/kv_format.h"
#include "src/quant/number.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

using quant::kPageTokens;
using quant::KvPageLayout;
using quant::KvPart;

inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A panel somewhere: in scratch, or in the page itself.
struct Panel {
  const float* data = nullptr;
  int64_t stride = 0;
};

// Floats that a panel of V may write past its last row, in whole vectors.
constexpr int64_t kPanelSlack = 16;

HWY_INLINE VU LoadBytes(const uint8_t* at) {
  return hn::PromoteTo(DU(), hn::LoadU(hn::Rebind<uint8_t, DF>(), at));
}

HWY_INLINE VF LoadHalves(const std::byte* at) {
  const hn::Rebind<hwy::float16_t, DF> dh;
  return hn::PromoteTo(DF(), hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(at)));
}

// Rows of a matrix of codes that end at a byte border in every plane, and how a code is cut out of
// the words (bytes of one column each) that hold it.
template <int kBits>
struct CodeUnit {
  static constexpr quant::KvPlanes kPlanes = quant::kv_planes(kBits);
  static constexpr int kPerLow = 8 / kPlanes.low;
  static constexpr int kRows = kPlanes.high > 0 ? 8 / kPlanes.high : kPerLow;
  static constexpr int kLowRows = kRows / kPerLow;  // rows of bytes of the low plane

  VU low[kLowRows], high;

  // Words of kLanes columns; `stride`: bytes between rows of bytes.
  HWY_INLINE void Load(const uint8_t* low_bytes, const uint8_t* high_bytes, int64_t stride) {
    Unrolled<kLowRows>([&](auto i)
                           FRAMEQUILT_INLINE { low[i] = LoadBytes(low_bytes + i * stride); });
    if constexpr (kPlanes.high > 0) high = LoadBytes(high_bytes);
  }

  static constexpr int Shift(int row) { return row % kPerLow * kPlanes.low; }
  // Of row kRow of the unit; minus = zero + CodeBase(Shift(kRow)).
  template <int kRow>
  HWY_INLINE VF Code(VF minus) const {
    constexpr int kShift = Shift(kRow);
    if constexpr (kPlanes.high == 0) {
      return CodeMinusZero<kBits, kShift>(low[kRow / kPerLow], minus);
    } else {
      const DU du;
      constexpr int kFrom = kRow * kPlanes.high, kTo = kShift + kPlanes.low;
      constexpr uint32_t kLowMask = ((1u << kPlanes.low) - 1) << kShift;
      constexpr uint32_t kHighMask = ((1u << kPlanes.high) - 1) << kTo;
      constexpr uint32_t kExponent = (127u + 23u - kShift) << 23;
      VU moved = high;
      if constexpr (kFrom > kTo) moved = hn::ShiftRight<kFrom - kTo>(moved);
      if constexpr (kFrom < kTo) moved = hn::ShiftLeft<kTo - kFrom>(moved);
      const VU part = hn::OrAnd(hn::Set(du, kExponent), low[kRow / kPerLow], hn::Set(du, kLowMask));
      const VU whole = hn::OrAnd(part, moved, hn::Set(du, kHighMask));
      return hn::Sub(hn::BitCast(DF(), whole), minus);
    }
  }
};

// Row of bytes of a plane that row `row` (a multiple of the unit's rows) starts in.
constexpr int64_t PlaneRow(int64_t row, int plane_bits) { return row * plane_bits / 8; }

// Parameters of one head of a page as float32, [groups][64].
struct PageParams {
  const float* scales = nullptr;  // null: floats, all 1
  const float* zeros = nullptr;
};

// Floats that ReadParams needs.
inline int64_t ParamFloats(const KvPart& part) {
  return part.has_codes() ? 2 * int64_t{part.groups} * kPageTokens : 0;
}

// Of all 64 tokens; behind the last real one they are anything.
inline PageParams ReadParams(const KvPageLayout& layout, const KvPart& part, const std::byte* head,
                             float* scratch) {
  if (!part.has_codes()) return {};
  const DF df;
  const int64_t count = int64_t{part.groups} * kPageTokens;
  const auto* const zeros = reinterpret_cast<const uint8_t*>(head + part.zeros);
  for (int64_t i = 0; i < count; i += kLanes) {
    const VF scale = layout.format.scale32
                         ? hn::LoadU(df, reinterpret_cast<const float*>(head + part.scales) + i)
                         : LoadHalves(head + part.scales + i * 2);
    hn::Store(scale, df, scratch + i);
    const hn::Rebind<int32_t, DF> di;
    hn::Store(hn::ConvertTo(df, hn::BitCast(di, LoadBytes(zeros + i))), df, scratch + count + i);
  }
  return {scratch, scratch + count};
}

// --- Panels ----------------------------------------------------------------------------------

template <int kBits>
void ReadCodesK(const KvPart& part, const std::byte* head, const PageParams& params, int64_t tokens,
                float* out) {
  using Unit = CodeUnit<kBits>;
  const DF df;
  for (int64_t g = 0; g < part.groups; ++g) {
    const int64_t begin = g * part.group, end = begin + part.group;
    for (int64_t t = 0; t < tokens; t += kLanes) {
      const VF zero = hn::LoadU(df, params.zeros + g * kPageTokens + t);
      VF minus[Unit::kPerLow];
      Unrolled<Unit::kPerLow>([&](auto i) FRAMEQUILT_INLINE {
        minus[i] = hn::Add(zero, hn::Set(df, CodeBase(Unit::Shift(i))));
      });
      for (int64_t d = begin; d < end; d += Unit::kRows) {
        const auto* const bytes = reinterpret_cast<const uint8_t*>(head) + t;
        Unit unit;
        unit.Load(bytes + part.low + PlaneRow(d, Unit::kPlanes.low) * kPageTokens,
                  bytes + part.high + PlaneRow(d, Unit::kPlanes.high) * kPageTokens, kPageTokens);
        Unrolled<Unit::kRows>([&](auto row) FRAMEQUILT_INLINE {
          if (d + row < end) {
            hn::Store(unit.template Code<row>(minus[row % Unit::kPerLow]), df,
                      out + (d + row) * kPageTokens + t);
          }
        });
      }
    }
  }
}

// Writes whole units of tokens, at most 64.
template <int kBits>
void ReadCodesV(const KvPart& part, const std::byte* head, const PageParams& params, int64_t tokens,
                int64_t stride, float* out) {
  using Unit = CodeUnit<kBits>;
  const DF df;
  const auto* const bytes = reinterpret_cast<const uint8_t*>(head);
  for (int64_t t = 0; t < tokens; t += Unit::kRows) {
    const uint8_t* const low = bytes + part.low + PlaneRow(t, Unit::kPlanes.low) * part.columns;
    const uint8_t* const high = bytes + part.high + PlaneRow(t, Unit::kPlanes.high) * part.columns;
    for (int64_t g = 0; g < part.groups; ++g) {
      VF minus[Unit::kRows];
      Unrolled<Unit::kRows>([&](auto row) FRAMEQUILT_INLINE {
        minus[row] =
            hn::Set(df, params.zeros[g * kPageTokens + t + row] + CodeBase(Unit::Shift(row)));
      });
      // The vector across the border of groups is whole: groups are multiples of 16 or all dims.
      const int64_t end = (g + 1) * part.group;
      for (int64_t c = g * part.group; c < end; c += kLanes) {
        Unit unit;
        unit.Load(low + c, high + c, part.columns);
        Unrolled<Unit::kRows>([&](auto row) FRAMEQUILT_INLINE {
          hn::StoreU(unit.template Code<row>(minus[row]), df, out + (t + row) * stride + c);
        });
      }
    }
  }
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

// K of `tokens` tokens (a multiple of kLanes; what lies behind the last real one is never used).
inline Panel ReadK(const KvPart& part, const std::byte* head, const PageParams& params,
                   int64_t tokens, float* scratch) {
  const DF df;
  if (part.bits == 32) return {reinterpret_cast<const float*>(head + part.low), kPageTokens};
  if (part.bits == 16) {
    for (int64_t d = 0; d < part.rows; ++d) {
      for (int64_t t = 0; t < tokens; t += kLanes) {
        hn::Store(LoadHalves(head + part.low + (d * kPageTokens + t) * 2), df,
                  scratch + d * kPageTokens + t);
      }
    }
  } else {
    WithBits(part.bits, [&](auto bits) FRAMEQUILT_INLINE {
      ReadCodesK<bits>(part, head, params, tokens, scratch);
    });
  }
  return {scratch, kPageTokens};
}

// V of the first `tokens` tokens with rows of `stride` floats (head_dim rounded up to kLanes).
// scratch: 64 rows and kPanelSlack.
inline Panel ReadV(const KvPart& part, const std::byte* head, const PageParams& params,
                   int64_t tokens, int64_t stride, float* scratch) {
  const DF df;
  const std::byte* const v = head + part.low;
  const int64_t dims = part.columns;
  if (part.bits == 32) {
    if (dims == stride) return {reinterpret_cast<const float*>(v), stride};
    for (int64_t t = 0; t < tokens; ++t) {
      std::memcpy(scratch + t * stride, v + t * dims * 4,
                  static_cast<size_t>(dims) * sizeof(float));
    }
  } else if (part.bits == 16) {
    for (int64_t t = 0; t < tokens; ++t) {
      const std::byte* const row = v + t * dims * 2;
      int64_t i = 0;
      for (; i + kLanes <= dims; i += kLanes)
        hn::StoreU(LoadHalves(row + i * 2), df, scratch + t * stride + i);
      for (; i < dims; ++i) {
        uint16_t half;
        std::memcpy(&half, row + i * 2, sizeof half);
        scratch[t * stride + i] = quant::float_from_half(half);
      }
    }
  } else {
    WithBits(part.bits, [&](auto bits) FRAMEQUILT_INLINE {
      ReadCodesV<bits>(part, head, params, tokens, stride, scratch);
    });
  }
  return {scratch, stride};
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
