// What a linear's input rows become (engine/CONTRACT.md, 1.4): codes, per token and dynamic, as the
// scalar reference of the integer kernels, or bfloat16 numbers. Pure functions; any thread.
#pragma once

#include <cstdint>

#include "src/model/spec.h"

namespace fq::quant {

// x is (code - zero) * scale. Codes and zero are stored signed: minus 2^(bits-1) when asymmetric.
struct QuantizedRow {
  float scale = 0;
  int zero = 0;
};

// Codes of x[n]. Values that are not finite make a scale that is not finite (the row's outputs
// then are not finite either) and codes of 0.
QuantizedRow quantize_row(const float* x, int64_t n, model::ActivationFormat format, int8_t* codes);

// Inputs whose products are summed as integers before they are scaled: a group, but at most this
// many, so that a sum stays below 2^24 and float32 holds it exactly (512 * 255 * 128).
inline constexpr int kIntegerSpan = 512;

// Inputs in bfloat16: x[n] rounded to nearest even, as float32 (exact). y may be x.
void round_row(const float* x, int64_t n, float* y);

// Inputs in bfloat16 whose products are summed in one float32 sum before they are scaled: a group,
// but at most this many.
inline constexpr int kRoundedSpan = 256;

}  // namespace fq::quant
