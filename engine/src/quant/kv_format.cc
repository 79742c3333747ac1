// Layout of a KV page and the scalar reference of its number formats. Pure functions, any thread;
// pages belong to the caller.
#include "src/quant/kv_format.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "src/quant/number.h"

namespace fq::quant {
namespace {

constexpr int kDefaultGroup = 128;

template <class T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

template <class T>
void store(std::byte* at, T value) {
  std::memcpy(at, &value, sizeof(T));
}

// K is [dim][token], V is [token][dim]; so are their parameters, by group instead of dim.
struct Place {
  const KvPageLayout& layout;
  size_t head;  // start of the head's part
  int slot;

  size_t k_element(int dim) const { return static_cast<size_t>(dim) * kPageTokens + slot; }
  size_t v_element(int dim) const { return static_cast<size_t>(slot) * layout.head_dim + dim; }
  size_t k_param(size_t offset, int group) const {
    return head + offset + (static_cast<size_t>(group) * kPageTokens + slot) * sizeof(float);
  }
  size_t v_param(size_t offset, int group) const {
    return head + offset + (static_cast<size_t>(slot) * layout.groups + group) * sizeof(float);
  }
  // kv4: the byte of a dim and the shift of its nibble.
  size_t k_byte4(int dim) const { return static_cast<size_t>(dim / 2) * kPageTokens + slot; }
  size_t v_byte4(int dim) const {
    const int half = layout.head_dim / 2;
    return static_cast<size_t>(slot) * half + dim % half;
  }
  int k_shift4(int dim) const { return dim % 2 * 4; }
  int v_shift4(int dim) const { return dim / (layout.head_dim / 2) * 4; }
};

void put_nibble(std::byte* at, int shift, uint8_t code) {
  const auto kept = static_cast<uint8_t>(*at) & static_cast<uint8_t>(0xF0 >> shift);
  *at = static_cast<std::byte>(kept | (code << shift));
}

uint8_t get_nibble(const std::byte* at, int shift) {
  return static_cast<uint8_t>((static_cast<uint8_t>(*at) >> shift) & 0xF);
}

void write_affine(const Place& p, std::byte* page, const float* k, const float* v) {
  const KvPageLayout& l = p.layout;
  const int bits = l.format.bits;
  for (int g = 0; g < l.groups; ++g) {
    const int begin = g * l.group;
    const AffineParams kp = affine_params(k + begin, l.group, bits, /*include_zero=*/true);
    const AffineParams vp = affine_params(v + begin, l.group, bits, /*include_zero=*/true);
    store(page + p.k_param(l.k_scale_offset, g), kp.scale);
    store(page + p.k_param(l.k_zero_offset, g), kp.zero);
    store(page + p.v_param(l.v_scale_offset, g), vp.scale);
    store(page + p.v_param(l.v_zero_offset, g), vp.zero);
    for (int dim = begin; dim < begin + l.group; ++dim) {
      const uint8_t k_code = affine_code(k[dim], kp, bits);
      const uint8_t v_code = affine_code(v[dim], vp, bits);
      std::byte* const k_part = page + p.head + l.k_offset;
      std::byte* const v_part = page + p.head + l.v_offset;
      if (bits == 8) {
        k_part[p.k_element(dim)] = static_cast<std::byte>(k_code);
        v_part[p.v_element(dim)] = static_cast<std::byte>(v_code);
      } else {
        put_nibble(k_part + p.k_byte4(dim), p.k_shift4(dim), k_code);
        put_nibble(v_part + p.v_byte4(dim), p.v_shift4(dim), v_code);
      }
    }
  }
}

void read_affine(const Place& p, const std::byte* page, float* k, float* v) {
  const KvPageLayout& l = p.layout;
  for (int dim = 0; dim < l.head_dim; ++dim) {
    const int g = dim / l.group;
    const std::byte* const k_part = page + p.head + l.k_offset;
    const std::byte* const v_part = page + p.head + l.v_offset;
    const bool is8 = l.format.bits == 8;
    const float k_code = is8 ? static_cast<uint8_t>(k_part[p.k_element(dim)])
                             : get_nibble(k_part + p.k_byte4(dim), p.k_shift4(dim));
    const float v_code = is8 ? static_cast<uint8_t>(v_part[p.v_element(dim)])
                             : get_nibble(v_part + p.v_byte4(dim), p.v_shift4(dim));
    k[dim] = (k_code - load<float>(page + p.k_param(l.k_zero_offset, g))) *
             load<float>(page + p.k_param(l.k_scale_offset, g));
    v[dim] = (v_code - load<float>(page + p.v_param(l.v_zero_offset, g))) *
             load<float>(page + p.v_param(l.v_scale_offset, g));
  }
}

}  // namespace

std::string KvFormat::name() const { return "kv" + std::to_string(bits); }

Result<KvFormat> parse_kv_format(std::string_view text) {
  for (const int bits : {32, 16, 8, 4}) {
    const KvFormat format{.bits = bits, .group = 0};
    if (format.name() == text) return format;
  }
  return Error{Code::kInvalidArgument, "unknown KV cache format '" + std::string(text) + "'",
               "use one of kv32, kv16, kv8, kv4"};
}

Result<KvPageLayout> KvPageLayout::make(KvFormat format, int kv_heads, int head_dim) {
  const int bits = format.bits;
  if (bits != 32 && bits != 16 && bits != 8 && bits != 4) {
    return Error{Code::kUnsupported, "KV cache with " + std::to_string(bits) + " bits",
                 "use 32, 16, 8 or 4 bits"};
  }
  if (kv_heads < 1 || head_dim < 1) {
    return Error{Code::kUnsupported,
                 "KV cache of " + std::to_string(kv_heads) + " heads of " +
                     std::to_string(head_dim) + " dimensions",
                 ""};
  }
  if (bits == 4 && head_dim % 2 != 0) {
    return Error{
        Code::kUnsupported,
        "kv4 packs two dimensions per byte, head dimension " + std::to_string(head_dim) + " is odd",
        "use kv8, kv16 or kv32"};
  }
  KvPageLayout layout;
  layout.format = format;
  layout.kv_heads = kv_heads;
  layout.head_dim = head_dim;
  const size_t part =
      static_cast<size_t>(head_dim) * kPageTokens * bits / 8;  // a multiple of 64 (kv4: even dim)
  layout.k_offset = 0;
  layout.v_offset = part;
  size_t end = 2 * part;
  if (bits <= 8) {
    // specs/quantization 1.5: min(group, head_dim), and head_dim where that does not divide it.
    const int wanted = std::min(format.group > 0 ? format.group : kDefaultGroup, head_dim);
    layout.group = head_dim % wanted == 0 ? wanted : head_dim;
    layout.groups = head_dim / layout.group;
    const size_t params = static_cast<size_t>(layout.groups) * kPageTokens * sizeof(float);
    layout.k_scale_offset = end;
    layout.k_zero_offset = end + params;
    layout.v_scale_offset = end + 2 * params;
    layout.v_zero_offset = end + 3 * params;
    end += 4 * params;
  }
  layout.head_bytes = end;
  layout.page_bytes = end * static_cast<size_t>(kv_heads);
  return layout;
}

AffineParams affine_params(const float* x, int n, int bits, bool include_zero) {
  const float qmax = static_cast<float>((1 << bits) - 1);
  float low = include_zero ? 0.0f : x[0];
  float high = low;
  for (int i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  const float range = high - low;
  AffineParams params;
  params.scale = (range > 1e-5f ? range : 1e-5f) / qmax;
  params.zero = clamped(-std::nearbyint(low / params.scale), 0.0f, qmax);
  return params;
}

uint8_t affine_code(float x, AffineParams p, int bits) {
  const float qmax = static_cast<float>((1 << bits) - 1);
  return static_cast<uint8_t>(clamped(std::nearbyint(x / p.scale) + p.zero, 0.0f, qmax));
}

void kv_write_reference(const KvPageLayout& layout, std::byte* page, int slot, const float* k,
                        const float* v) {
  for (int head = 0; head < layout.kv_heads; ++head) {
    const Place p{layout, layout.head_bytes * static_cast<size_t>(head), slot};
    const float* const k_head = k + static_cast<size_t>(head) * layout.head_dim;
    const float* const v_head = v + static_cast<size_t>(head) * layout.head_dim;
    std::byte* const k_part = page + p.head + layout.k_offset;
    std::byte* const v_part = page + p.head + layout.v_offset;
    if (layout.format.bits <= 8) {
      write_affine(p, page, k_head, v_head);
    } else if (layout.format.bits == 16) {
      for (int dim = 0; dim < layout.head_dim; ++dim) {
        store(k_part + 2 * p.k_element(dim), half_from_float_saturated(k_head[dim]));
        store(v_part + 2 * p.v_element(dim), half_from_float_saturated(v_head[dim]));
      }
    } else {
      for (int dim = 0; dim < layout.head_dim; ++dim) {
        store(k_part + 4 * p.k_element(dim), k_head[dim]);
        store(v_part + 4 * p.v_element(dim), v_head[dim]);
      }
    }
  }
}

void kv_read_reference(const KvPageLayout& layout, const std::byte* page, int slot, int head,
                       float* k, float* v) {
  const Place p{layout, layout.head_bytes * static_cast<size_t>(head), slot};
  const std::byte* const k_part = page + p.head + layout.k_offset;
  const std::byte* const v_part = page + p.head + layout.v_offset;
  if (layout.format.bits <= 8) {
    read_affine(p, page, k, v);
  } else if (layout.format.bits == 16) {
    for (int dim = 0; dim < layout.head_dim; ++dim) {
      k[dim] = float_from_half(load<uint16_t>(k_part + 2 * p.k_element(dim)));
      v[dim] = float_from_half(load<uint16_t>(v_part + 2 * p.v_element(dim)));
    }
  } else {
    for (int dim = 0; dim < layout.head_dim; ++dim) {
      k[dim] = load<float>(k_part + 4 * p.k_element(dim));
      v[dim] = load<float>(v_part + 4 * p.v_element(dim));
    }
  }
}

}  // namespace fq::quant
