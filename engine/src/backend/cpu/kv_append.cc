// Kernel that writes rows into KV pages: quantizes each (token, head, group) by vectors with the
// arithmetic of quant/kv_format.h. Pages belong to the caller. Called by the engine thread, runs on
// the pool.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "src/backend/cpu/disabled_targets.h"
#include "src/backend/cpu/kernels.h"
#include "src/quant/number.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/backend/cpu/kv_append.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "src/backend/cpu/gemm-inl.h"
#include "src/backend/cpu/targets.h"

HWY_BEFORE_NAMESPACE();
namespace fq::backend::cpu {
namespace HWY_NAMESPACE {
#if FRAMEQUILT_HAVE_SIMD

using quant::AffineParams;
using quant::kPageTokens;
using quant::KvPageLayout;

HWY_INLINE AffineParams GroupParams(const float* x, int n, float qmax) {
  const DF df;
  VF low = hn::Zero(df), high = hn::Zero(df);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VF v = hn::LoadU(df, x + i);
    low = hn::Min(low, v);
    high = hn::Max(high, v);
  }
  float least = hn::GetLane(hn::MinOfLanes(df, low));
  float most = hn::GetLane(hn::MaxOfLanes(df, high));
  for (; i < n; ++i) {
    least = std::min(least, x[i]);
    most = std::max(most, x[i]);
  }
  const float range = most - least;
  AffineParams params;
  params.scale = (range > 1e-5f ? range : 1e-5f) / qmax;
  params.zero = quant::clamped(-std::nearbyint(least / params.scale), 0.0f, qmax);
  return params;
}

// Codes of one head and their parameters, per group.
HWY_INLINE void QuantizeHead(const KvPageLayout& layout, const float* x, uint8_t* codes,
                             AffineParams* params) {
  const DF df;
  const hn::Rebind<int32_t, DF> di;
  const hn::Rebind<uint8_t, DF> d8;
  const int bits = layout.format.bits;
  const float qmax = static_cast<float>((1 << bits) - 1);
  for (int g = 0; g < layout.groups; ++g) {
    const int begin = g * layout.group, end = begin + layout.group;
    params[g] = GroupParams(x + begin, layout.group, qmax);
    const VF scale = hn::Set(df, params[g].scale), zero = hn::Set(df, params[g].zero);
    int i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const VF code = hn::Add(hn::Round(hn::Div(hn::LoadU(df, x + i), scale)), zero);
      const VF inside = hn::Min(hn::Max(code, hn::Zero(df)), hn::Set(df, qmax));
      hn::StoreU(hn::DemoteTo(d8, hn::ConvertTo(di, inside)), d8, codes + i);
    }
    for (; i < end; ++i) codes[i] = quant::affine_code(x[i], params[g], bits);
  }
}

HWY_INLINE void PutParam(std::byte* at, float value) { std::memcpy(at, &value, sizeof value); }

void AppendAffine(const KvPageLayout& layout, std::byte* head, int slot, const float* k,
                  const float* v) {
  uint8_t k_codes[kMaxHeadDim], v_codes[kMaxHeadDim];
  AffineParams k_params[kMaxHeadDim], v_params[kMaxHeadDim];
  QuantizeHead(layout, k, k_codes, k_params);
  QuantizeHead(layout, v, v_codes, v_params);
  for (int g = 0; g < layout.groups; ++g) {
    const size_t k_at =
        (static_cast<size_t>(g) * kPageTokens + static_cast<size_t>(slot)) * sizeof(float);
    const size_t v_at = static_cast<size_t>(slot * layout.groups + g) * sizeof(float);
    PutParam(head + layout.k_scale_offset + k_at, k_params[g].scale);
    PutParam(head + layout.k_zero_offset + k_at, k_params[g].zero);
    PutParam(head + layout.v_scale_offset + v_at, v_params[g].scale);
    PutParam(head + layout.v_zero_offset + v_at, v_params[g].zero);
  }
  auto* const k_out = reinterpret_cast<uint8_t*>(head + layout.k_offset) + slot;
  const int dims = layout.head_dim;
  if (layout.format.bits == 8) {
    for (int d = 0; d < dims; ++d) k_out[d * kPageTokens] = k_codes[d];
    std::memcpy(head + layout.v_offset + static_cast<size_t>(slot) * dims, v_codes,
                static_cast<size_t>(dims));
    return;
  }
  const int half = dims / 2;
  auto* const v_out = reinterpret_cast<uint8_t*>(head + layout.v_offset) + slot * half;
  for (int d = 0; d < half; ++d) {
    k_out[d * kPageTokens] = static_cast<uint8_t>(k_codes[2 * d] | (k_codes[2 * d + 1] << 4));
    v_out[d] = static_cast<uint8_t>(v_codes[d] | (v_codes[d + half] << 4));
  }
}

void AppendFloat(const KvPageLayout& layout, std::byte* head, int slot, const float* k,
                 const float* v) {
  const int dims = layout.head_dim;
  if (layout.format.bits == 32) {
    auto* const k_out = reinterpret_cast<float*>(head + layout.k_offset) + slot;
    for (int d = 0; d < dims; ++d) k_out[d * kPageTokens] = k[d];
    std::memcpy(head + layout.v_offset + static_cast<size_t>(slot * dims) * sizeof(float), v,
                static_cast<size_t>(dims) * sizeof(float));
    return;
  }
  auto* const k_out = reinterpret_cast<uint16_t*>(head + layout.k_offset) + slot;
  auto* const v_out = reinterpret_cast<uint16_t*>(head + layout.v_offset) + slot * dims;
  for (int d = 0; d < dims; ++d) {
    k_out[d * kPageTokens] = quant::half_from_float_saturated(k[d]);
    v_out[d] = quant::half_from_float_saturated(v[d]);
  }
}

void KvAppend(const ops::KvAppendArgs& args, ThreadPool& pool) {
  constexpr int64_t kBlock = 16;  // rows of one item
  if (args.rows == 0) return;
  const KvPageLayout& layout = *args.kv.layout;
  const auto append = layout.format.bits <= 8 ? AppendAffine : AppendFloat;
  pool.parallel_for((args.rows + kBlock - 1) / kBlock, [&](int64_t item, int) {
    for (int64_t row = item * kBlock; row < std::min(args.rows, (item + 1) * kBlock); ++row) {
      const int64_t token = args.begin + row;
      std::byte* const page = args.kv.pages[token / kPageTokens];
      for (int head = 0; head < layout.kv_heads; ++head) {
        const int64_t at = int64_t{head} * layout.head_dim;
        append(layout, page + layout.head_bytes * static_cast<size_t>(head),
               static_cast<int>(token % kPageTokens), args.k + row * args.k_stride + at,
               args.v + row * args.v_stride + at);
      }
    }
  });
}

#else  // one-lane targets: never chosen, see simd_targets()

void KvAppend(const ops::KvAppendArgs& args, ThreadPool& pool) {
  scalar_kernels().kv_append(args, pool);
}

#endif
}  // namespace HWY_NAMESPACE
}  // namespace fq::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fq::backend::cpu {

HWY_EXPORT(KvAppend);

void fill_kv_append_kernels(Kernels& kernels) {
  kernels.kv_append = &HWY_DYNAMIC_DISPATCH(KvAppend);
}

}  // namespace fq::backend::cpu
#endif  // HWY_ONCE
