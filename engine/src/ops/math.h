// The elementary functions of the kernels, scalar form. The vector form (backend/cpu/math-inl.h)
// does the same operations in the same order, so both agree bit for bit wherever a fused
// multiply-add exists. Pure functions, any thread.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "src/model/spec.h"

namespace fq::ops {

// Constants shared by the scalar and the vector form.
struct MathConstants {
  // exp: n = round(x / ln 2) through the shift below, r = x - n ln 2 in two steps, e^r = 1 + r +
  // r^2 q(r) with q a minimax polynomial on |r| <= ln(2)/2 (error 3.2e-9 of e^r), then times 2^n in
  // two exact halves.
  static constexpr float kExpLow = -87.336544f;  // below: 0 (the smallest normal results are kept)
  static constexpr float kExpHigh = 88.722839f;  // above: infinity
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kRoundShift = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kLn2High = 0.693359375f;    // 9 significant bits: n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kExp0 = 0.5f;
  static constexpr float kExp1 = 0.166665196f;
  static constexpr float kExp2 = 0.0416662097f;
  static constexpr float kExp3 = 0.00836881623f;
  static constexpr float kExp4 = 0.00139503274f;
  // Normal tail: Phi(-z) = exp(-z^2/2) * t * p(t), t = 1 / (1 + 0.35 z), fitted on 0 <= z <= 13.5
  // (relative error 3.2e-8, 2.6e-7 with float32 arithmetic).
  static constexpr float kTailStep = 0.35f;
  static constexpr float kTail[9] = {0.139621571f, 0.13985908f,    0.119852439f,
                                     0.105432905f, -0.0229370408f, 0.15892911f,
                                     -0.25550437f, 0.143872127f,   -0.0291258376f};
  static constexpr float kGeluTanhScale = 1.59576912f;  // 2 sqrt(2 / pi)
  static constexpr float kGeluTanhCube = 0.044715f;
};

// Error at most 2 ulp (tests/engine/ops/math_test.cc checks every 1013th float). exp(0) is exactly
// 1, exp(-inf) and everything that would be subnormal is 0.
inline float exp_f32(float x) {
  using C = MathConstants;
  if (!(x >= C::kExpLow)) return x != x ? x : 0.0f;
  if (x > C::kExpHigh) return INFINITY;
  const float n = std::fma(x, C::kLog2E, C::kRoundShift) - C::kRoundShift;
  float r = std::fma(n, -C::kLn2High, x);
  r = std::fma(n, -C::kLn2Low, r);
  float q = std::fma(C::kExp4, r, C::kExp3);
  q = std::fma(q, r, C::kExp2);
  q = std::fma(q, r, C::kExp1);
  q = std::fma(q, r, C::kExp0);
  const float y = std::fma(r * r, q, r) + 1.0f;
  const int32_t whole = static_cast<int32_t>(n);
  const int32_t half = whole >> 1;
  const float a = std::bit_cast<float>((half + 127) << 23);
  const float b = std::bit_cast<float>((whole - half + 127) << 23);
  return y * a * b;
}

inline float silu(float x) { return x / (1.0f + exp_f32(-x)); }

// x Phi(x), the erf form.
inline float gelu(float x) {
  using C = MathConstants;
  const float z = std::fabs(x);
  const float t = 1.0f / std::fma(C::kTailStep, z, 1.0f);
  float p = C::kTail[8];
  for (int i = 7; i >= 0; --i) p = std::fma(p, t, C::kTail[i]);
  const float tail = exp_f32(-0.5f * (z * z)) * (p * t);
  return x * (x >= 0.0f ? 1.0f - tail : tail);
}

// 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x sigmoid(2 ...).
inline float gelu_tanh(float x) {
  using C = MathConstants;
  const float inner = std::fma(C::kGeluTanhCube * (x * x), x, x);
  return x / (1.0f + exp_f32(-(C::kGeluTanhScale * inner)));
}

inline float activate(model::Activation kind, float x) {
  switch (kind) {
    case model::Activation::kRelu:
      return x > 0.0f ? x : 0.0f;
    case model::Activation::kGelu:
      return gelu(x);
    case model::Activation::kGeluTanh:
      return gelu_tanh(x);
    case model::Activation::kSilu:
      return silu(x);
  }
  return x;
}

// Long sums are kept as 16 partial sums (element i goes to sum i mod 16), which every vector width
// can do, and are added up in this order.
inline constexpr int kSumLanes = 16;
inline float add_lanes(float* lanes) {
  for (int width = kSumLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// Of a row that has no partner, or whose norm is zero or not finite: below every cosine.
inline constexpr float kNoSimilarity = -2.0f;
inline float cosine(float dot, float a_squared, float b_squared) {
  const float norms = std::sqrt(a_squared) * std::sqrt(b_squared);
  return norms > 0.0f && std::isfinite(norms) && std::isfinite(dot) ? dot / norms : kNoSimilarity;
}

}  // namespace fq::ops
