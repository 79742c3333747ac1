// Quantizes and packs float32 weights into the tile layout of engine/CONTRACT.md ("Weight
// formats"): the scalar reference of the converter, and what tests and benchmarks make weights
// with. The result owns its bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "framequilt/status.h"
#include "src/core/aligned.h"
#include "src/quant/linear_weights.h"

namespace fq::quant {

// Range of a group: `kReference` is exactly the published quantizer (a group far from zero is
// destroyed when asymmetric), `kIncludeZero` extends it to contain zero (specs/quantization
// section 1.1).
enum class AffineRange : uint8_t { kReference, kIncludeZero };

// One quantized group: code = clamp(round(x / scale) + zero); value = (code - zero) * scale.
// Symmetric: zero is 2^(bits-1). With offset: zero is 0 and value = code * scale + offset. `scale`
// and `offset` are already rounded to their stored type.
struct WeightGroup {
  float scale = 0;
  int zero = 0;
  float offset = 0;
};
// Not of formats with scales in I8, whose groups depend on each other.
WeightGroup weight_group(const float* x, int n, const model::WeightFormat& format,
                         AffineRange range);
int weight_code(float x, WeightGroup group, int bits);

// Owns what `view` points to. Moving keeps the view valid; bias is the caller's.
struct PackedLinear {
  LinearWeights view;
  AlignedBuffer<std::byte> data, scales, zeros, offsets, scale_steps, offset_steps;
  size_t data_bytes = 0, scale_bytes = 0, zero_bytes = 0, offset_bytes = 0;
  size_t step_bytes = 0;  // of each table of steps
};

// weights [out, in], row-major. `range` matters for asymmetric groups only. Errors: unsupported
// formats.
Result<PackedLinear> pack_linear(const float* weights, int out, int in,
                                 const model::WeightFormat& format, AffineRange range);

}  // namespace fq::quant
