// Scalar quantizer and packer of weights. Results own their bytes; pure functions, any thread.
#include "src/quant/affine_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "src/quant/kv_format.h"
#include "src/quant/number.h"

namespace fq::quant {
namespace {

using model::WeightFormat;

float stored_scale(float scale, DType dtype) {
  return dtype == DType::kF16 ? float_from_half(half_from_float_saturated(scale)) : scale;
}

template <class T>
void put(AlignedBuffer<std::byte>& buffer, int64_t index, T value) {
  std::memcpy(buffer.data() + index * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
}

void allocate(AlignedBuffer<std::byte>& buffer, size_t& size, int64_t bytes) {
  size = static_cast<size_t>(bytes);
  buffer.reserve(size);
  std::memset(buffer.data(), 0, size);
}

void pack_f32(const float* weights, PackedLinear& p) {
  const LinearWeights& w = p.view;
  allocate(p.data, p.data_bytes, int64_t{w.tiles} * w.in * kTileRows * 4);
  for (int row = 0; row < w.out; ++row) {
    for (int col = 0; col < w.in; ++col) {
      const int64_t block = int64_t{row / kTileRows} * w.in + col;
      put(p.data, block * kTileRows + row % kTileRows, weights[int64_t{row} * w.in + col]);
    }
  }
}

void pack_bf16(const float* weights, PackedLinear& p) {
  const LinearWeights& w = p.view;
  const int64_t pairs = (w.in + 1) / 2;
  allocate(p.data, p.data_bytes, w.tiles * pairs * kTileRows * 4);
  for (int row = 0; row < w.out; ++row) {
    for (int col = 0; col < w.in; ++col) {
      const int64_t block = row / kTileRows * pairs + col / 2;
      put(p.data, (block * kTileRows + row % kTileRows) * 2 + col % 2,
          bf16_from_float(weights[int64_t{row} * w.in + col]));
    }
  }
}

void put_code(PackedLinear& p, int row, int col, int code) {
  const LinearWeights& w = p.view;
  const int64_t superblock =
      int64_t{row / kTileRows} * (w.padded_in() / kInputPadding) + col / kInputPadding;
  int64_t block = superblock * w.format.bits;
  const Planes planes = planes_of(w.format.bits);
  for (int i = 0; i < planes.count; ++i) {
    const Plane& plane = planes.plane[i];
    const PlaneBit at = plane_bit(plane, col % kInputPadding);
    const int part = code >> plane.shift & ((1 << plane.bits) - 1);
    const int64_t byte = ((block + at.block) * kTileRows + row % kTileRows) * 4 + at.byte;
    p.data[static_cast<size_t>(byte)] |= static_cast<std::byte>(part << at.bit);
    block += plane.blocks;
  }
}

// A table entry of the scales' type; `step`: what I8 is times.
void put_number(AlignedBuffer<std::byte>& table, int64_t index, float value, DType dtype,
                float step) {
  switch (dtype) {
    case DType::kF32:
      return put(table, index, value);
    case DType::kI8:
      return put(table, index, static_cast<int8_t>(step > 0.0f ? value / step : 0.0f));  // exact
    default:
      return put(table, index, half_from_float_saturated(value));
  }
}

float least(const float* x, int n, AffineRange range) {
  float low = range == AffineRange::kIncludeZero ? 0.0f : x[0];
  for (int i = 0; i < n; ++i) low = std::min(low, x[i]);
  return low;
}

int zero_of(float low, float scale, int bits) {
  const float qmax = static_cast<float>((1 << bits) - 1);
  return static_cast<int>(clamped(-std::nearbyint(low / scale), 0.0f, qmax));
}

// What the scales and offsets in I8 of some groups are times.
struct Steps {
  float scale = 0, offset = 0;
};

// The least half that times 127 reaches `most`.
float step_for(float most) {
  uint16_t half = half_from_float_saturated(most / 127.0f);
  while (float_from_half(half) * 127.0f < most && float_from_half(half) < kMaxHalf) ++half;
  return float_from_half(half);
}

// Groups that share their steps, of consecutive inputs `x`. A group reaches all that it would reach
// by itself: offsets are rounded down, scales up.
Steps stepped_groups(const float* x, int n, const WeightFormat& format, AffineRange range,
                     std::span<WeightGroup> groups) {
  WeightFormat own = format;
  own.scale = DType::kF32;
  const float qmax = static_cast<float>((1 << format.bits) - 1);
  const auto inputs = [&](size_t g) {
    const int begin = static_cast<int>(g) * format.group;
    return std::pair(x + begin, std::min(format.group, n - begin));
  };
  float scale = 0.0f, offset = 0.0f;
  for (size_t g = 0; g < groups.size(); ++g) {
    const auto [first, count] = inputs(g);
    groups[g] = weight_group(first, count, own, range);
    offset = std::max(offset, std::fabs(groups[g].offset));
  }
  Steps steps;
  steps.offset = step_for(offset);
  for (WeightGroup& group : groups) {
    if (steps.offset > 0.0f) {
      const float factor = clamped(std::floor(group.offset / steps.offset), -127.0f, 127.0f);
      group.scale += std::max(0.0f, group.offset - factor * steps.offset) / qmax;
      group.offset = factor * steps.offset;
    }
    scale = std::max(scale, group.scale);
  }
  steps.scale = step_for(scale);
  for (size_t g = 0; g < groups.size(); ++g) {
    WeightGroup& group = groups[g];
    group.scale = clamped(std::ceil(group.scale / steps.scale), 1.0f, 127.0f) * steps.scale;
    const auto [first, count] = inputs(g);
    if (!format.symmetric && !format.offset)
      group.zero = zero_of(least(first, count, range), group.scale, format.bits);
  }
  return steps;
}

void pack_affine(const float* weights, AffineRange range, PackedLinear& p) {
  LinearWeights& w = p.view;
  const WeightFormat& f = w.format;
  const int padded_out = w.tiles * kTileRows;
  const int scale_bytes = static_cast<int>(dtype_bytes(f.scale));
  allocate(p.data, p.data_bytes, int64_t{padded_out} * w.padded_in() * f.bits / 8);
  allocate(p.scales, p.scale_bytes, int64_t{padded_out} * w.groups * scale_bytes);
  if (f.offset) {
    allocate(p.offsets, p.offset_bytes, int64_t{padded_out} * w.groups * scale_bytes);
  } else if (!f.symmetric) {
    allocate(p.zeros, p.zero_bytes, int64_t{padded_out} * w.groups);
  }
  if (f.stepped()) {
    allocate(p.scale_steps, p.step_bytes, int64_t{padded_out} * w.steps * 2);
    if (f.offset) allocate(p.offset_steps, p.step_bytes, int64_t{padded_out} * w.steps * 2);
  }
  const auto place = [](int row, int64_t count, int64_t at) {
    return (row / kTileRows * count + at) * kTileRows + row % kTileRows;
  };
  // Groups that depend on each other: those of a step, else one.
  const int together = 1 << w.step_shift;
  std::vector<WeightGroup> groups;
  for (int row = 0; row < padded_out; ++row) {
    const float* const x = weights + int64_t{row} * w.in;
    Steps steps;
    for (int g = 0; g < w.groups; ++g) {
      const int begin = g * w.group;
      const int end = std::min(begin + w.group, w.in);
      const int padded_end = std::min(begin + w.group, w.padded_in());
      if (g % together == 0) {
        const WeightGroup none{.scale = 0, .zero = f.symmetric ? 1 << (f.bits - 1) : 0};
        groups.assign(static_cast<size_t>(std::min(together, w.groups - g)), none);
        if (row < w.out && f.stepped()) {
          steps = stepped_groups(x + begin, w.in - begin, f, range, groups);
        } else if (row < w.out) {
          groups[0] = weight_group(x + begin, end - begin, f, range);
        }
        if (f.stepped()) {
          const int64_t at = place(row, w.steps, g / together);
          put(p.scale_steps, at, half_from_float_saturated(steps.scale));
          if (f.offset) put(p.offset_steps, at, half_from_float_saturated(steps.offset));
        }
      }
      const WeightGroup& group = groups[static_cast<size_t>(g % together)];
      for (int col = begin; col < padded_end; ++col) {
        const bool real = row < w.out && col < end;
        put_code(p, row, col, real ? weight_code(x[col], group, f.bits) : group.zero);
      }
      const int64_t at = place(row, w.groups, g);
      put_number(p.scales, at, group.scale, f.scale, steps.scale);
      if (f.offset) {
        put_number(p.offsets, at, group.offset, f.scale, steps.offset);
      } else if (!f.symmetric) {
        p.zeros[static_cast<size_t>(at)] = static_cast<std::byte>(group.zero);
      }
    }
  }
  w.scales = p.scales.data();
  if (f.offset) w.offsets = p.offsets.data();
  if (f.stepped()) w.scale_steps = p.scale_steps.data();
  if (f.stepped() && f.offset) w.offset_steps = p.offset_steps.data();
  if (!f.symmetric && !f.offset) w.zeros = reinterpret_cast<const uint8_t*>(p.zeros.data());
}

}  // namespace

WeightGroup weight_group(const float* x, int n, const WeightFormat& format, AffineRange range) {
  WeightGroup group;
  if (format.symmetric) {
    const float qmax = static_cast<float>((1 << (format.bits - 1)) - 1);
    float most = 0.0f;
    for (int i = 0; i < n; ++i) most = std::max(most, std::fabs(x[i]));
    group.scale = stored_scale(std::max(most, 1e-5f) / qmax, format.scale);
    group.zero = 1 << (format.bits - 1);
    return group;
  }
  const bool include_zero = range == AffineRange::kIncludeZero;
  group.scale = stored_scale(affine_params(x, n, format.bits, include_zero).scale, format.scale);
  const float low = least(x, n, range);
  if (format.offset) {
    group.offset = stored_scale(low, format.scale);
  } else {
    group.zero = zero_of(low, group.scale, format.bits);
  }
  return group;
}

int weight_code(float x, WeightGroup group, int bits) {
  const float qmax = static_cast<float>((1 << bits) - 1);
  return static_cast<int>(
      clamped(std::nearbyint((x - group.offset) / group.scale) + static_cast<float>(group.zero),
              0.0f, qmax));
}

Result<PackedLinear> pack_linear(const float* weights, int out, int in, const WeightFormat& format,
                                 AffineRange range) {
  PackedLinear packed;
  LinearWeights& w = packed.view;
  w.format = format;
  w.out = out;
  w.in = in;
  w.tiles = (out + kRowPadding - 1) / kRowPadding * (kRowPadding / kTileRows);
  switch (format.kind) {
    case WeightFormat::Kind::kF32:
      pack_f32(weights, packed);
      break;
    case WeightFormat::Kind::kBF16:
      pack_bf16(weights, packed);
      break;
    case WeightFormat::Kind::kAffine:
      if (!model::is_affine_format(format)) {
        return Error{Code::kUnsupported,
                     "weights cannot be packed as " + std::to_string(format.bits) +
                         " bits in groups of " + std::to_string(format.group),
                     model::kAffineFormats};
      }
      w.set_groups();
      pack_affine(weights, range, packed);
      break;
  }
  w.data = packed.data.data();
  w.data_bytes = static_cast<int64_t>(packed.data_bytes);
  const size_t tables_of_steps = format.offset ? 2 : 1;
  w.bytes = static_cast<int64_t>(packed.data_bytes + packed.scale_bytes + packed.zero_bytes +
                                 packed.offset_bytes + tables_of_steps * packed.step_bytes);
  return packed;
}

}  // namespace fq::quant
