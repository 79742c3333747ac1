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
using quant::KvPart;

// quant::kv_params by vectors.
HWY_INLINE AffineParams GroupParams(const float* x, int n, int bits, bool scale32) {
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
  const float qmax = static_cast<float>((1 << bits) - 1);
  AffineParams params;
  params.scale = quant::kv_scale(most - least, bits, scale32);
  params.zero = quant::clamped(-std::nearbyint(least / params.scale), 0.0f, qmax);
  return params;
}

// Codes of one head, and their parameters into the page.
HWY_INLINE void QuantizeHead(const KvPart& part, bool scale32, std::byte* head, int slot,
                             const float* x, uint8_t* codes) {
  const DF df;
  const hn::Rebind<int32_t, DF> di;
  const hn::Rebind<uint8_t, DF> d8;
  const float qmax = static_cast<float>((1 << part.bits) - 1);
  for (int g = 0; g < part.groups; ++g) {
    const int begin = g * part.group, end = begin + part.group;
    const AffineParams params = GroupParams(x + begin, part.group, part.bits, scale32);
    const VF scale = hn::Set(df, params.scale), zero = hn::Set(df, params.zero);
    int i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const VF code = hn::Add(hn::Round(hn::Div(hn::LoadU(df, x + i), scale)), zero);
      const VF inside = hn::Min(hn::Max(code, hn::Zero(df)), hn::Set(df, qmax));
      hn::StoreU(hn::DemoteTo(d8, hn::ConvertTo(di, inside)), d8, codes + i);
    }
    for (; i < end; ++i) codes[i] = quant::affine_code(x[i], params, part.bits);
    const size_t at = static_cast<size_t>(g) * kPageTokens + static_cast<size_t>(slot);
    if (scale32) {
      std::memcpy(head + part.scales + 4 * at, &params.scale, 4);
    } else {
      const uint16_t half = quant::half_from_float(params.scale);  // exact
      std::memcpy(head + part.scales + 2 * at, &half, 2);
    }
    head[part.zeros + at] = static_cast<std::byte>(params.zero);
  }
}

// Bits [from, from + bits) of the codes into a plane of K: 8/bits dims of the token in a byte.
HWY_INLINE void PackK(const uint8_t* codes, int dims, int from, int bits, uint8_t* out) {
  const int per_byte = 8 / bits, mask = (1 << bits) - 1;
  for (int d = 0; d < dims; d += per_byte, out += kPageTokens) {
    int byte = 0;
    for (int i = 0; i < per_byte && d + i < dims; ++i)
      byte |= ((codes[d + i] >> from) & mask) << (bits * i);
    *out = static_cast<uint8_t>(byte);
  }
}

// The same for V: the token's bits in bytes that 8/bits tokens share.
HWY_INLINE void PackV(const uint8_t* codes, int dims, int from, int bits, int slot, uint8_t* out) {
  const int per_byte = 8 / bits, shift = slot % per_byte * bits, mask = (1 << bits) - 1;
  const int kept = ~(mask << shift);
  out += slot / per_byte * dims;
  for (int d = 0; d < dims; ++d)
    out[d] = static_cast<uint8_t>((out[d] & kept) | (((codes[d] >> from) & mask) << shift));
}

void AppendPart(const KvPageLayout& layout, const KvPart& part, bool is_k, std::byte* head,
                int slot, const float* x) {
  const int dims = layout.head_dim;
  std::byte* const low = head + part.low;
  if (part.bits == 32) {
    auto* const out = reinterpret_cast<float*>(low);
    if (is_k) {
      for (int d = 0; d < dims; ++d) out[d * kPageTokens + slot] = x[d];
    } else {
      std::memcpy(out + slot * dims, x, static_cast<size_t>(dims) * sizeof(float));
    }
    return;
  }
  if (part.bits == 16) {
    auto* const out = reinterpret_cast<uint16_t*>(low);
    for (int d = 0; d < dims; ++d)
      out[is_k ? d * kPageTokens + slot : slot * dims + d] = quant::half_from_float_saturated(x[d]);
    return;
  }
  uint8_t codes[kMaxHeadDim];
  QuantizeHead(part, layout.format.scale32, head, slot, x, codes);
  const quant::KvPlanes planes = quant::kv_planes(part.bits);
  const auto pack = [&](size_t offset, int from, int bits) {
    auto* const out = reinterpret_cast<uint8_t*>(head + offset);
    if (is_k) {
      PackK(codes, dims, from, bits, out + slot);
    } else {
      PackV(codes, dims, from, bits, slot, out);
    }
  };
  pack(part.low, 0, planes.low);
  if (planes.high > 0) pack(part.high, planes.low, planes.high);
}

void KvAppend(const ops::KvAppendArgs& args, ThreadPool& pool) {
  // Tokens of one item. Tokens of a page may share bytes, eight at most: items begin at multiples
  // of eight.
  constexpr int64_t kTokens = 16;
  if (args.rows == 0) return;
  const KvPageLayout& layout = *args.kv.layout;
  const int64_t first = args.begin / kTokens, end = args.begin + args.rows;
  pool.parallel_for((end - 1) / kTokens + 1 - first, [&](int64_t item, int) {
    const int64_t from = std::max(args.begin, (first + item) * kTokens);
    const int64_t to = std::min(end, (first + item + 1) * kTokens);
    for (int64_t token = from; token < to; ++token) {
      std::byte* const page = args.kv.pages[token / kPageTokens];
      const int slot = static_cast<int>(token % kPageTokens);
      const int64_t row = token - args.begin;
      for (int head = 0; head < layout.kv_heads; ++head) {
        const int64_t at = int64_t{head} * layout.head_dim;
        std::byte* const part = page + layout.head_bytes * static_cast<size_t>(head);
        AppendPart(layout, layout.k, true, part, slot, args.k + row * args.k_stride + at);
        AppendPart(layout, layout.v, false, part, slot, args.v + row * args.v_stride + at);
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
