// Quantization of a linear's input rows (engine/CONTRACT.md, "Quantized activations"): per token,
// dynamic, as the scalar reference of the integer kernels. Pure functions; any thread.
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

}  // namespace fq::quant
