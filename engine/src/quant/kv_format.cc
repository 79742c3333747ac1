// Layout of a page, and the scalar reference of what is stored in it. Pure
// functions, any thread; pages belong to the caller.
#include "src/quant/kv_format.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "src/quant/number.h"

namespace fq::quant {
namespace {

constexpr int kDefaultGroup = 128;
constexpr size_t kAlign = 64;
constexpr int kMaxDims = 1024;

size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

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

// --- Elements of a part ----------------------------------------------------------------------

struct Element {
  size_t low, high;  // bytes from the head's start
  int low_shift, high_shift;
};

Element element(const KvPart& part, int row, int column) {
  const KvPlanes planes = kv_planes(part.bits);
  const auto place = [&](int bits, size_t* byte, int* shift) {
    const int per_byte = 8 / bits;
    *byte += static_cast<size_t>(row / per_byte) * static_cast<size_t>(part.columns) +
             static_cast<size_t>(column);
    *shift = row % per_byte * bits;
  };
  Element e{part.low, part.high, 0, 0};
  place(planes.low, &e.low, &e.low_shift);
  if (planes.high > 0) place(planes.high, &e.high, &e.high_shift);
  return e;
}

// `alone`: no other token has bits in this byte, so that the first of its rows clears the padding.
void put_bits(std::byte* at, int shift, int bits, int value, bool alone) {
  const int mask = alone && shift == 0 ? 0xFF : ((1 << bits) - 1) << shift;
  *at = static_cast<std::byte>((static_cast<int>(*at) & ~mask) | (value << shift));
}

int get_bits(const std::byte* at, int shift, int bits) {
  return (static_cast<int>(*at) >> shift) & ((1 << bits) - 1);
}

size_t param_index(int group, int slot) {
  return static_cast<size_t>(group) * kPageTokens + static_cast<size_t>(slot);
}

// Row and column of a dim of a token: K is transposed, V is not.
struct Cell {
  int row, column;
};
Cell cell(const KvPageLayout& layout, const KvPart& part, int dim, int slot) {
  return &part == &layout.k ? Cell{dim, slot} : Cell{slot, dim};
}

void write_part(const KvPageLayout& layout, const KvPart& part, std::byte* head, int slot,
                const float* x) {
  const KvPlanes planes = kv_planes(part.bits);
  const bool is_k = &part == &layout.k;
  for (int g = 0; g < part.groups; ++g) {
    const int begin = g * part.group;
    AffineParams p{1.0f, 0.0f};
    if (part.has_codes()) {
      p = kv_params(x + begin, part.group, part.bits, layout.format.scale32);
      const size_t at = param_index(g, slot);
      if (layout.format.scale32) {
        store(head + part.scales + at * 4, p.scale);
      } else {
        store(head + part.scales + at * 2, half_from_float(p.scale));  // exact
      }
      store(head + part.zeros + at, static_cast<uint8_t>(p.zero));
    }
    for (int dim = begin; dim < begin + part.group; ++dim) {
      const auto [row, column] = cell(layout, part, dim, slot);
      const size_t index = static_cast<size_t>(row) * static_cast<size_t>(part.columns) +
                           static_cast<size_t>(column);
      if (part.bits == 32) {
        store(head + part.low + 4 * index, x[dim]);
      } else if (part.bits == 16) {
        store(head + part.low + 2 * index, half_from_float_saturated(x[dim]));
      } else {
        const int code = affine_code(x[dim], p, part.bits);
        const Element e = element(part, row, column);
        put_bits(head + e.low, e.low_shift, planes.low, code & ((1 << planes.low) - 1), is_k);
        if (planes.high > 0)
          put_bits(head + e.high, e.high_shift, planes.high, code >> planes.low, is_k);
      }
    }
  }
}

KvPart make_part(int bits, int rows, int columns, int head_dim, KvFormat format, size_t* end) {
  KvPart part;
  part.bits = bits;
  part.rows = rows;
  part.columns = columns;
  part.group = head_dim;
  part.low = *end;
  const auto plane = [&](int plane_bits) {  // 8 rows of 1 bit are one row of bytes
    const int per_byte = plane_bits <= 8 ? 8 / plane_bits : 1;
    const int row_bytes = plane_bits <= 8 ? columns : columns * plane_bits / 8;
    *end = aligned(*end + static_cast<size_t>((rows + per_byte - 1) / per_byte) *
                              static_cast<size_t>(row_bytes));
  };
  if (!part.has_codes()) {
    plane(bits);
    return part;
  }
  const KvPlanes planes = kv_planes(bits);
  plane(planes.low);
  part.high = *end;
  if (planes.high > 0) plane(planes.high);
  // specs/quantization 1.2: min(group, head_dim), and head_dim where that does not divide it.
  const int wanted = std::min(format.group > 0 ? format.group : kDefaultGroup, head_dim);
  part.group = head_dim % wanted == 0 ? wanted : head_dim;
  part.groups = head_dim / part.group;
  const size_t params = static_cast<size_t>(part.groups) * kPageTokens;
  part.scales = *end;
  part.zeros = part.scales + params * (format.scale32 ? 4 : 2);
  *end = part.zeros + params;
  return part;
}

}  // namespace

Result<KvPageLayout> KvPageLayout::make(KvFormat format, int kv_heads, int head_dim) {
  for (const int bits : {format.k_bits, format.v_bits}) {
    if (std::find(model::kKvBits.begin(), model::kKvBits.end(), bits) == model::kKvBits.end()) {
      return Error{Code::kUnsupported, "KV cache with " + std::to_string(bits) + " bits",
                   "use 32, 16, 8, 6, 4, 3 or 2 bits"};
    }
  }
  if (format.group != 0 && std::find(model::kKvGroups.begin(), model::kKvGroups.end(),
                                     format.group) == model::kKvGroups.end()) {
    return Error{Code::kUnsupported, "KV groups of " + std::to_string(format.group),
                 "use 16, 32, 64 or 128, or 0 for the default"};
  }
  if (kv_heads < 1 || head_dim < 1 || head_dim > kMaxDims) {
    return Error{Code::kUnsupported,
                 "KV cache of " + std::to_string(kv_heads) + " heads of " +
                     std::to_string(head_dim) + " dimensions",
                 "heads have up to " + std::to_string(kMaxDims) + " dimensions"};
  }
  KvPageLayout layout;
  layout.format = format;
  layout.kv_heads = kv_heads;
  layout.head_dim = head_dim;
  size_t end = 0;
  layout.k = make_part(format.k_bits, head_dim, kPageTokens, head_dim, format, &end);
  layout.v = make_part(format.v_bits, kPageTokens, head_dim, head_dim, format, &end);
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

float kv_scale(float range, int bits, bool scale32) {
  const float qmax = static_cast<float>((1 << bits) - 1);
  const float scale = (range > 1e-5f ? range : 1e-5f) / qmax;
  if (scale32) return scale;
  uint16_t half = half_from_float_saturated(scale);
  if (float_from_half(half) < scale && half < 0x7BFFu) ++half;  // the next larger half
  return float_from_half(half);
}

AffineParams kv_params(const float* x, int n, int bits, bool scale32) {
  const float qmax = static_cast<float>((1 << bits) - 1);
  float low = 0.0f, high = 0.0f;
  for (int i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  AffineParams params;
  params.scale = kv_scale(high - low, bits, scale32);
  params.zero = clamped(-std::nearbyint(low / params.scale), 0.0f, qmax);
  return params;
}

void kv_write_reference(const KvPageLayout& layout, std::byte* page, int slot, const float* k,
                        const float* v) {
  for (int head = 0; head < layout.kv_heads; ++head) {
    std::byte* const at = page + layout.head_bytes * static_cast<size_t>(head);
    const size_t skip = static_cast<size_t>(head) * static_cast<size_t>(layout.head_dim);
    write_part(layout, layout.k, at, slot, k + skip);
    write_part(layout, layout.v, at, slot, v + skip);
  }
}

void kv_read_factors(const KvPageLayout& layout, const KvPart& part, const std::byte* page,
                     int slot, int head, float* x, float* scales) {
  const std::byte* const at = page + layout.head_bytes * static_cast<size_t>(head);
  const KvPlanes planes = kv_planes(part.bits);
  for (int g = 0; g < part.groups; ++g) {
    float zero = 0.0f;
    scales[g] = 1.0f;
    if (part.has_codes()) {
      const size_t index = param_index(g, slot);
      scales[g] = layout.format.scale32
                      ? load<float>(at + part.scales + index * 4)
                      : float_from_half(load<uint16_t>(at + part.scales + index * 2));
      zero = static_cast<float>(load<uint8_t>(at + part.zeros + index));
    }
    for (int dim = g * part.group; dim < (g + 1) * part.group; ++dim) {
      const auto [row, column] = cell(layout, part, dim, slot);
      const size_t index = static_cast<size_t>(row) * static_cast<size_t>(part.columns) +
                           static_cast<size_t>(column);
      if (part.bits == 32) {
        x[dim] = load<float>(at + part.low + 4 * index);
      } else if (part.bits == 16) {
        x[dim] = float_from_half(load<uint16_t>(at + part.low + 2 * index));
      } else {
        const Element e = element(part, row, column);
        int code = get_bits(at + e.low, e.low_shift, planes.low);
        if (planes.high > 0) code |= get_bits(at + e.high, e.high_shift, planes.high) << planes.low;
        x[dim] = static_cast<float>(code) - zero;
      }
    }
  }
}

void kv_read_reference(const KvPageLayout& layout, const std::byte* page, int slot, int head,
                       float* k, float* v) {
  std::array<float, kMaxDims / model::kKvGroups[0]> scales;
  const auto read = [&](const KvPart& part, float* x) {
    kv_read_factors(layout, part, page, slot, head, x, scales.data());
    for (int dim = 0; dim < layout.head_dim; ++dim)
      x[dim] *= scales[static_cast<size_t>(dim / part.group)];
  };
  read(layout.k, k);
  read(layout.v, v);
}

}  // namespace fq::quant
