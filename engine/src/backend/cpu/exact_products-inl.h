// The inner products of attention over KV with codes as the numerics `exact` have them: codes
// become float32 factors, token by token with the scalar reader, which are multiplied as floats
// are. The definition, to compare with; nothing here is meant to be fast. Included once per SIMD
// target.
#if defined(FRAMEQUILT_CPU_EXACT_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FRAMEQUILT_CPU_EXACT_PRODUCTS_INL_H_
#undef FRAMEQUILT_CPU_EXACT_PRODUCTS_INL_H_
#else
#define FRAMEQUILT_CPU_EXACT_PRODUCTS_INL_H_
#endif

#include <algorithm>
#include <cmath>

#include "hwy/highway.h"
#include "src/backend/cpu/attention_scratch.h"
#include "src/backend/cpu/attention_tile-inl.h"
#include "src/backend/cpu/targets.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

constexpr int64_t kAttentionTileRows = 96;  // query rows (times heads of a kv head) of one tile

// Factors of one part of `tokens` tokens: panel [head_dim][64] (K) or [64][stride] (V), scales
// [groups][64].
inline void ReadFactors(const KvPageLayout& layout, const KvPart& part, const std::byte* head,
                        int64_t tokens, int64_t token_stride, int64_t dim_stride, float* panel,
                        float* scales) {
  float factors[kMaxHeadDim], of_token[kMaxHeadDim];
  for (int64_t t = 0; t < tokens; ++t) {
    quant::kv_read_factors(layout, part, head, static_cast<int>(t), 0, factors, of_token);
    for (int64_t d = 0; d < layout.head_dim; ++d)
      panel[t * token_stride + d * dim_stride] = factors[d];
    for (int64_t g = 0; g < part.groups; ++g) scales[g * kPageTokens + t] = of_token[g];
  }
}

// What PageScores of attention.cc does, with the order of operations of floats.
inline void ExactScores(const KvPageLayout& layout, const std::byte* head, int64_t first,
                        int64_t rows, int64_t tokens, AttentionScratch& s, float* scores,
                        int64_t stride) {
  const KvPart& part = layout.k;
  std::fill_n(s.k.data(), layout.head_dim * kBlock, 0.0f);
  ReadFactors(layout, part, head, tokens, 1, kBlock, s.k.data(), s.scales.data());
  HWY_ALIGN float dots[kAttentionTileRows * kBlock];
  // Importance has more rows than a tile.
  for (int64_t begin = 0; begin < rows; begin += kAttentionTileRows) {
    const int64_t count = std::min(kAttentionTileRows, rows - begin);
    for (int64_t g = 0; g < part.groups; ++g) {
      const int64_t dim = g * part.group;
      PanelScores(s.q.data() + (first + begin) * layout.head_dim + dim, layout.head_dim, count,
                  part.group, {s.k.data() + dim * kBlock, kBlock}, RoundUp(tokens, kLanes), dots,
                  kBlock);
      const float* const scales = s.scales.data() + g * kPageTokens;
      for (int64_t r = 0; r < count; ++r) {
        float* const to = scores + (begin + r) * stride;
        for (int64_t t = 0; t < tokens; ++t) {
          const float dot = dots[r * kBlock + t];
          to[t] = g == 0 ? dot * scales[t] : std::fma(dot, scales[t], to[t]);
        }
      }
    }
  }
}

inline void ExactValues(const KvPageLayout& layout, const std::byte* head, const float* p,
                        int64_t rows, int64_t tokens, AttentionScratch& s, float* out,
                        int64_t out_stride) {
  const KvPart& part = layout.v;
  std::fill_n(s.v.data(), kBlock * out_stride, 0.0f);
  ReadFactors(layout, part, head, tokens, out_stride, 1, s.v.data(), s.scales.data());
  HWY_ALIGN float weights[kAttentionTileRows * kBlock];
  for (int64_t g = 0; g < part.groups; ++g) {
    const float* const scales = s.scales.data() + g * kPageTokens;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t t = 0; t < tokens; ++t) weights[r * kBlock + t] = p[r * kBlock + t] * scales[t];
    }
    const int64_t dim = g * part.group;
    PanelValues(weights, rows, tokens, {s.v.data() + dim, out_stride}, RoundUp(part.group, kLanes),
                out + dim, out_stride);
  }
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#endif
