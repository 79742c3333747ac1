// The elementary functions against double precision.
#include "src/ops/math.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace fq::ops {
namespace {

// Distance in units of the last place of `want`.
double ulps(float got, double want) {
  const float near = static_cast<float>(want);
  const double unit = std::max(std::ldexp(1.0, std::ilogb(near) - 23), 0x1p-149);
  return std::fabs(static_cast<double>(got) - want) / unit;
}

TEST(Exp, ErrorIsAtMostTwoUlp) {
  double worst = 0;
  const float high = std::log(std::numeric_limits<float>::max());
  const auto check = [&](float x) {
    worst = std::max(worst, ulps(exp_f32(x), std::exp(static_cast<double>(x))));
  };
  for (uint32_t bits = 0; bits <= std::bit_cast<uint32_t>(high); bits += 1013) {
    const float x = std::bit_cast<float>(bits);
    check(std::min(x, 88.72f));
    if (x <= 87.33f) check(-x);
  }
  EXPECT_LT(worst, 2.0);
}

TEST(Exp, EndsAreExact) {
  EXPECT_EQ(exp_f32(0.0f), 1.0f);
  EXPECT_EQ(exp_f32(-0.0f), 1.0f);
  EXPECT_EQ(exp_f32(-std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_EQ(exp_f32(-88.0f), 0.0f);
  EXPECT_EQ(exp_f32(-1e30f), 0.0f);
  EXPECT_TRUE(std::isinf(exp_f32(std::numeric_limits<float>::infinity())));
  EXPECT_TRUE(std::isinf(exp_f32(89.0f)));
  EXPECT_TRUE(std::isfinite(exp_f32(88.72f)));
  EXPECT_TRUE(std::isnan(exp_f32(std::numeric_limits<float>::quiet_NaN())));
}

TEST(Exp, IsMonotoneOnAGrid) {
  float last = 0.0f;
  for (int i = -8800; i <= 8800; ++i) {
    const float y = exp_f32(static_cast<float>(i) * 0.01f);
    EXPECT_GE(y, last);
    last = y;
  }
}

// exp errs by 2 ulp, its argument by half an ulp (times |x| in the result), the rest are three
// operations.
TEST(Activations, SiluIsNearDoublePrecision) {
  for (int i = -8000; i <= 8000; ++i) {
    const double x = static_cast<float>(i) * 0.01f;
    const double want = x / (1.0 + std::exp(-x));
    EXPECT_NEAR(silu(static_cast<float>(x)), want, std::fabs(want) * 8 * 0x1p-24) << x;
  }
  EXPECT_EQ(silu(-1e30f), 0.0f);
  EXPECT_EQ(silu(1e30f), 1e30f);
}

// The fit errs by 2.6e-7 of the tail (ops/math.h), exp(-x^2/2) by 2 ulp and by x^2/2 ulp of its
// argument.
TEST(Activations, GeluIsNearDoublePrecision) {
  for (int i = -13000; i <= 13000; ++i) {
    const double x = static_cast<float>(i) * 0.001f;
    const double tail = 0.5 * std::erfc(std::fabs(x) / std::sqrt(2.0));
    const double want = x * (x >= 0 ? 1.0 - tail : tail);
    const double bound =
        std::fabs(x) * (tail * (3e-7 + (4 + x * x) * 0x1p-24) + (x >= 0 ? 2 * 0x1p-24 : 0.0));
    EXPECT_NEAR(gelu(static_cast<float>(x)), want, bound + 1e-37) << x;
  }
  EXPECT_EQ(gelu(0.0f), 0.0f);
  EXPECT_EQ(gelu(20.0f), 20.0f);
  EXPECT_EQ(gelu(-20.0f), 0.0f);
}

TEST(Activations, GeluTanhIsNearDoublePrecision) {
  for (int i = -9000; i <= 9000; ++i) {
    const double x = static_cast<float>(i) * 0.001f;
    const double u = std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
    const double want = x / (1.0 + std::exp(-2 * u));
    // The exponent 2u carries 4 roundings, which the result sees times |2u|.
    EXPECT_NEAR(gelu_tanh(static_cast<float>(x)), want,
                std::fabs(want) * (8 + 8 * std::fabs(u)) * 0x1p-24 + 1e-37)
        << x;
  }
  EXPECT_EQ(gelu_tanh(-1e20f), 0.0f);
  EXPECT_EQ(gelu_tanh(1e20f), 1e20f);
}

TEST(AddLanes, AddsAllOnce) {
  float lanes[kSumLanes];
  for (int i = 0; i < kSumLanes; ++i) lanes[i] = static_cast<float>(1 << i);
  EXPECT_EQ(add_lanes(lanes), 65535.0f);
}

TEST(Cosine, RefusesNormsThatSayNothing) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(cosine(0.0f, 0.0f, 1.0f), kNoSimilarity);
  EXPECT_EQ(cosine(1.0f, inf, 1.0f), kNoSimilarity);
  EXPECT_EQ(cosine(NAN, NAN, 1.0f), kNoSimilarity);
  EXPECT_EQ(cosine(inf, 1e38f, 1e38f), kNoSimilarity);
  EXPECT_EQ(cosine(6.0f, 4.0f, 9.0f), 1.0f);
}

}  // namespace
}  // namespace fq::ops
