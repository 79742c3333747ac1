// Scalar quantizer and packer of weights. Results own their bytes; pure functions, any thread.
#include "src/quant/affine_weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

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
  const int per_block = w.format.bits == 8 ? 4 : 8;
  const int64_t block = int64_t{row / kTileRows} * (w.padded_in() / per_block) + col / per_block;
  std::byte& at = p.data[static_cast<size_t>((block * kTileRows + row % kTileRows) * 4 + col % 4)];
  const int shift = w.format.bits == 4 && col % 8 >= 4 ? 4 : 0;
  at |= static_cast<std::byte>(code << shift);
}

void pack_affine(const float* weights, AffineRange range, PackedLinear& p) {
  LinearWeights& w = p.view;
  const WeightFormat& f = w.format;
  const int padded_out = w.tiles * kTileRows;
  const int scale_bytes = static_cast<int>(dtype_bytes(f.scale));
  allocate(p.data, p.data_bytes, int64_t{padded_out} * w.padded_in() * f.bits / 8);
  allocate(p.scales, p.scale_bytes, int64_t{padded_out} * w.groups * scale_bytes);
  if (!f.symmetric) allocate(p.zeros, p.zero_bytes, int64_t{padded_out} * w.groups);
  for (int row = 0; row < padded_out; ++row) {
    for (int g = 0; g < w.groups; ++g) {
      const int begin = g * w.group;
      const int end = std::min(begin + w.group, w.in);
      const int padded_end = std::min(begin + w.group, w.padded_in());
      WeightGroup group{.scale = 0, .zero = f.symmetric ? 1 << (f.bits - 1) : 0};
      const float* const x = weights + int64_t{row} * w.in;
      if (row < w.out) group = weight_group(x + begin, end - begin, f, range);
      for (int col = begin; col < padded_end; ++col) {
        const bool real = row < w.out && col < end;
        put_code(p, row, col, real ? weight_code(x[col], group, f.bits) : group.zero);
      }
      const int64_t at = (int64_t{row / kTileRows} * w.groups + g) * kTileRows + row % kTileRows;
      if (f.scale == DType::kF32) {
        put(p.scales, at, group.scale);
      } else {
        put(p.scales, at, half_from_float_saturated(group.scale));
      }
      if (!f.symmetric) p.zeros[static_cast<size_t>(at)] = static_cast<std::byte>(group.zero);
    }
  }
  w.scales = p.scales.data();
  w.zeros = f.symmetric ? nullptr : reinterpret_cast<const uint8_t*>(p.zeros.data());
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
  float low = include_zero ? 0.0f : x[0];
  for (int i = 0; i < n; ++i) low = std::min(low, x[i]);
  const float qmax = static_cast<float>((1 << format.bits) - 1);
  group.zero = static_cast<int>(clamped(-std::nearbyint(low / group.scale), 0.0f, qmax));
  return group;
}

int weight_code(float x, WeightGroup group, int bits) {
  const float qmax = static_cast<float>((1 << bits) - 1);
  return static_cast<int>(
      clamped(std::nearbyint(x / group.scale) + static_cast<float>(group.zero), 0.0f, qmax));
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
      if ((format.bits != 4 && format.bits != 8) ||
          (format.scale != DType::kF16 && format.scale != DType::kF32) ||
          (format.group != 0 && format.group != 32 && format.group != 64 && format.group != 128)) {
        return Error{Code::kUnsupported,
                     "weights cannot be packed as " + std::to_string(format.bits) +
                         " bits in groups of " + std::to_string(format.group),
                     "4 or 8 bits, groups of 32, 64, 128 or 0 (per row), F16 or F32 scales"};
      }
      w.group = format.group == 0 ? w.padded_in() : format.group;
      w.groups = (in + w.group - 1) / w.group;
      pack_affine(weights, range, packed);
      break;
  }
  w.data = packed.data.data();
  w.bytes = static_cast<int64_t>(packed.data_bytes + packed.scale_bytes + packed.zero_bytes);
  return packed;
}

}  // namespace fq::quant
