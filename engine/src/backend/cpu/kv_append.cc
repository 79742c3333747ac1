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

// Bits [from, from + bits) of the codes into a plane of K: 8/bits dims of the token in a byte,
// bytes `stride` apart.
HWY_INLINE void PackK(const uint8_t* codes, int dims, int from, int bits, uint8_t* out,
                      int stride) {
  const int per_byte = 8 / bits, mask = (1 << bits) - 1;
  for (int d = 0; d < dims; d += per_byte, out += stride) {
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
      PackK(codes, dims, from, bits, out + slot, kPageTokens);
    } else {
      PackV(codes, dims, from, bits, slot, out);
    }
  };
  pack(part.low, 0, planes.low);
  if (planes.high > 0) pack(part.high, planes.low, planes.high);
}

// Tokens of one item of work. Tokens of a page may share bytes, eight at most: items begin at
// multiples of eight.
constexpr int kTokens = 16;

// 16 rows of 16 bytes, `stride` apart, as columns: to[r * to_stride + c] = from[c * stride + r].
HWY_INLINE void Transpose(const uint8_t* from, int64_t stride, uint8_t* to, int64_t to_stride) {
  const hn::Full128<uint8_t> d8;
  using V8 = hn::Vec<decltype(d8)>;
  V8 rows[kTokens], next[kTokens];
  Unrolled<kTokens>([&](auto i) FRAMEQUILT_INLINE { rows[i] = hn::LoadU(d8, from + i * stride); });
  // Each round interleaves the rows with those that are half of all further; after four of them
  // the bits of row and column have changed places.
  Unrolled<4>([&](auto round) FRAMEQUILT_INLINE {
    Unrolled<kTokens / 2>([&](auto i) FRAMEQUILT_INLINE {
      V8* const in = round % 2 == 0 ? rows : next;
      V8* const out = round % 2 == 0 ? next : rows;
      out[2 * i] = hn::InterleaveLower(d8, in[i], in[i + kTokens / 2]);
      out[2 * i + 1] = hn::InterleaveUpper(d8, in[i], in[i + kTokens / 2]);
    });
  });
  Unrolled<kTokens>([&](auto i) FRAMEQUILT_INLINE { hn::StoreU(rows[i], d8, to + i * to_stride); });
}

// AppendPart of K with codes, of kTokens tokens from `slot` on: dims of a token lie 64 bytes apart,
// so tokens go together, a vector of them to each dim.
void AppendKeys(const KvPageLayout& layout, std::byte* head, int slot, const float* x,
                int64_t stride) {
  const KvPart& part = layout.k;
  const quant::KvPlanes planes = quant::kv_planes(part.bits);
  HWY_ALIGN uint8_t codes[kTokens * kMaxHeadDim];
  const int64_t dims = layout.head_dim;
  for (int t = 0; t < kTokens; ++t)
    QuantizeHead(part, layout.format.scale32, head, slot + t, x + t * stride, codes + t * dims);
  const auto pack = [&](size_t offset, int from, int bits) {
    auto* const out = reinterpret_cast<uint8_t*>(head + offset) + slot;
    HWY_ALIGN uint8_t plane[kTokens * kMaxHeadDim];
    const int64_t bytes = (dims * bits + 7) / 8;
    const uint8_t* rows = codes;
    if (bits < 8) {
      for (int t = 0; t < kTokens; ++t)
        PackK(codes + t * dims, layout.head_dim, from, bits, plane + t * bytes, 1);
      rows = plane;
    }
    int64_t byte = 0;
    for (; byte + kTokens <= bytes; byte += kTokens)
      Transpose(rows + byte, bytes, out + byte * kPageTokens, kPageTokens);
    for (; byte < bytes; ++byte) {
      for (int t = 0; t < kTokens; ++t) out[byte * kPageTokens + t] = rows[t * bytes + byte];
    }
  };
  pack(part.low, 0, planes.low);
  if (planes.high > 0) pack(part.high, planes.low, planes.high);
}

void KvAppend(const ops::KvAppendArgs& args, ThreadPool& pool) {
  if (args.rows == 0) return;
  const KvPageLayout& layout = *args.kv.layout;
  const int64_t first = args.begin / kTokens, end = args.begin + args.rows;
  pool.parallel_for((end - 1) / kTokens + 1 - first, [&](int64_t item, int) {
    const int64_t from = std::max(args.begin, (first + item) * kTokens);
    const int64_t to = std::min(end, (first + item + 1) * kTokens);
    const bool together = layout.k.has_codes() && to - from == kTokens;
    for (int head = 0; head < layout.kv_heads; ++head) {
      const int64_t at = int64_t{head} * layout.head_dim;
      const size_t head_at = layout.head_bytes * static_cast<size_t>(head);
      // An item lies within a page.
      std::byte* const part = args.kv.pages[from / kPageTokens] + head_at;
      const auto slot_of = [](int64_t token) { return static_cast<int>(token % kPageTokens); };
      const float* const k = args.k + (from - args.begin) * args.k_stride + at;
      const float* const v = args.v + (from - args.begin) * args.v_stride + at;
      if (together) AppendKeys(layout, part, slot_of(from), k, args.k_stride);
      for (int64_t token = from; token < to; ++token) {
        const int64_t row = token - from;
        if (!together)
          AppendPart(layout, layout.k, true, part, slot_of(token), k + row * args.k_stride);
        AppendPart(layout, layout.v, false, part, slot_of(token), v + row * args.v_stride);
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
