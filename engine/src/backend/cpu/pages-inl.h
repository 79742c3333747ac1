// Reading one head of a KV page as float32 panels for the inner product: K as [head_dim][64], V as
// [tokens][stride]. Values equal quant::kv_read_reference bit for bit. Included once per SIMD
// target.
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

inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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

// K of `tokens` tokens (a multiple of kLanes; what lies behind the last real one is never used).
inline Panel ReadK(const KvPageLayout& layout, const std::byte* head, int64_t tokens,
                   float* scratch) {
  const DF df;
  const std::byte* const k = head + layout.k_offset;
  const int bits = layout.format.bits;
  if (bits == 32) return {reinterpret_cast<const float*>(k), kPageTokens};
  const Panel panel{scratch, kPageTokens};
  if (bits == 16) {
    for (int64_t d = 0; d < layout.head_dim; ++d) {
      for (int64_t t = 0; t < tokens; t += kLanes) {
        hn::Store(LoadHalves(k + (d * kPageTokens + t) * 2), df, scratch + d * kPageTokens + t);
      }
    }
    return panel;
  }
  const auto* const scales = reinterpret_cast<const float*>(head + layout.k_scale_offset);
  const auto* const zeros = reinterpret_cast<const float*>(head + layout.k_zero_offset);
  const auto* const codes = reinterpret_cast<const uint8_t*>(k);
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t begin = g * layout.group, end = begin + layout.group;
    for (int64_t t = 0; t < tokens; t += kLanes) {
      const VF scale = hn::LoadU(df, scales + g * kPageTokens + t);
      const VF zero = hn::LoadU(df, zeros + g * kPageTokens + t);
      const VF minus = hn::Add(zero, hn::Set(df, CodeBase(0)));
      float* out = scratch + begin * kPageTokens + t;
      if (bits == 8) {
        for (int64_t d = begin; d < end; ++d, out += kPageTokens) {
          const VF code = CodeMinusZero<8, 0>(LoadBytes(codes + d * kPageTokens + t), minus);
          hn::Store(hn::Mul(code, scale), df, out);
        }
        continue;
      }
      const VF minus_high = hn::Add(zero, hn::Set(df, CodeBase(4)));
      for (int64_t d = begin; d < end; ++d, out += kPageTokens) {
        const VU both = LoadBytes(codes + d / 2 * kPageTokens + t);
        const VF code =
            d % 2 == 0 ? CodeMinusZero<4, 0>(both, minus) : CodeMinusZero<4, 4>(both, minus_high);
        hn::Store(hn::Mul(code, scale), df, out);
      }
    }
  }
  return panel;
}

// Floats that ReadV may write past the last row, in whole vectors.
constexpr int64_t kPanelSlack = 16;

// V codes of one token by whole vectors. Reads up to 15 bytes past the token (still inside the
// page: parameters follow) and writes up to kPanelSlack floats past its row.
template <int kBits>
HWY_INLINE void ReadTokenV(const uint8_t* codes, const float* scales, const float* zeros,
                           int64_t head_dim, int64_t group, float* out) {
  const DF df;
  const int64_t bytes = kBits == 8 ? head_dim : head_dim / 2;
  for (int half = 0; half < 8 / kBits; ++half) {
    int64_t in_group = half * bytes, g = 0;
    for (; in_group >= group; in_group -= group) ++g;
    for (int64_t i = 0; i < bytes;) {
      const VF scale = hn::Set(df, scales[g]);
      const VF minus = hn::Set(df, zeros[g] + CodeBase(half * 4));
      const int64_t group_end = std::min(bytes, i + group - in_group);
      for (; i < group_end; i += kLanes) {
        const VU raw = LoadBytes(codes + i);
        VF code;
        if constexpr (kBits == 8) {
          code = CodeMinusZero<8, 0>(raw, minus);
        } else {
          code = half == 0 ? CodeMinusZero<4, 0>(raw, minus) : CodeMinusZero<4, 4>(raw, minus);
        }
        hn::StoreU(hn::Mul(code, scale), df, out + half * bytes + i);
      }
      i = group_end;
      in_group = 0;
      ++g;
    }
  }
}

// V of the first `tokens` tokens with rows of `stride` floats (head_dim rounded up to kLanes).
inline Panel ReadV(const KvPageLayout& layout, const std::byte* head, int64_t tokens,
                   int64_t stride, float* scratch) {
  const DF df;
  const std::byte* const v = head + layout.v_offset;
  const int64_t dims = layout.head_dim;
  const int bits = layout.format.bits;
  const Panel panel{scratch, stride};
  if (bits == 32) {
    if (dims == stride) return {reinterpret_cast<const float*>(v), stride};
    for (int64_t t = 0; t < tokens; ++t) {
      std::memcpy(scratch + t * stride, v + t * dims * 4,
                  static_cast<size_t>(dims) * sizeof(float));
    }
    return panel;
  }
  if (bits == 16) {
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
    return panel;
  }
  const auto* const scales = reinterpret_cast<const float*>(head + layout.v_scale_offset);
  const auto* const zeros = reinterpret_cast<const float*>(head + layout.v_zero_offset);
  const auto* const codes = reinterpret_cast<const uint8_t*>(v);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* const s = scales + t * layout.groups;
    const float* const z = zeros + t * layout.groups;
    if (bits == 8) {
      ReadTokenV<8>(codes + t * dims, s, z, dims, layout.group, scratch + t * stride);
    } else {
      ReadTokenV<4>(codes + t * (dims / 2), s, z, dims, layout.group, scratch + t * stride);
    }
  }
  return panel;
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
