// Encoder attention with 8-bit queries and keys (engine/CONTRACT.md, 1.5): numbers that the scalar
// reference and the kernels share. After SageAttention (arXiv 2410.02367, section 4), with integers
// where it keeps 16-bit floats: no rounding but those named here, so that every order of summation
// gives the same bits. Pure functions, any thread.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "src/ops/math.h"
#include "src/ops/ops.h"

namespace fq::ops {

struct IntegerAttention {
  // exp(0) as a code: the sum of a span's products, 256 * 2^13 * 1023, just fits in int32.
  static constexpr int kProbabilityOne = 1 << 13;
  static constexpr int kValueMost = 1023;  // values: 11 bits, symmetric, per channel of a head
  static constexpr int kValueSpan = 256;   // tokens whose products are added as integers
  static_assert(kIntegerAttentionMostTokens * kProbabilityOne <= INT32_MAX);
  static_assert(int64_t{kValueSpan} * kProbabilityOne * kValueMost <= INT32_MAX);

  // 2^x for x <= 0 in steps of 1 / kProbabilityOne. n = round(x), and 2^(x - n) times
  // kProbabilityOne by a minimax polynomial on |r| <= 1/2: error 2.6e-6 of it, 1/46 of a step.
  static constexpr float kLowest = -15.0f;  // below: code 0
  static constexpr float kPower[5] = {8191.99395f, 5678.0539f, 1968.10709f, 458.079111f,
                                      78.3982747f};
};

inline int probability_code(float x) {
  using I = IntegerAttention;
  const float inside = std::max(x, I::kLowest);
  const float n = (inside + MathConstants::kRoundShift) - MathConstants::kRoundShift;
  const float r = inside - n;
  float y = std::fma(I::kPower[4], r, I::kPower[3]);
  y = std::fma(y, r, I::kPower[2]);
  y = std::fma(y, r, I::kPower[1]);
  y = std::fma(y, r, I::kPower[0]);
  const float power = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return static_cast<int>(std::nearbyint(y * power));
}

}  // namespace fq::ops
