// The 16-bit conversions against arithmetic on the value.
#include "src/quant/number.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace fq::quant {
namespace {

// IEEE half by its definition.
double half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double size =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return (bits & 0x8000) != 0 ? -size : size;
}

TEST(Half, EveryFiniteValueIsReadExactlyAndComesBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    if (((bits >> 10) & 31) == 31) continue;
    const auto half = static_cast<uint16_t>(bits);
    ASSERT_EQ(float_from_half(half), half_value(half)) << bits;
    ASSERT_EQ(half_from_float(float_from_half(half)), half) << bits;
  }
}

TEST(Half, RoundsToTheNearestEven) {
  for (uint32_t bits = 0; bits < 0x7BFF; ++bits) {
    const auto low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits + 1);
    const double middle = 0.5 * (half_value(low) + half_value(high));
    const float tie = static_cast<float>(middle);
    ASSERT_EQ(static_cast<double>(tie), middle);  // a tie is a float
    ASSERT_EQ(half_from_float(tie), bits % 2 == 0 ? low : high) << bits;
    ASSERT_EQ(half_from_float(std::nextafter(tie, 0.0f)), low) << bits;
    ASSERT_EQ(half_from_float(std::nextafter(tie, 1e6f)), high) << bits;
    ASSERT_EQ(half_from_float(-tie), (bits % 2 == 0 ? low : high) | 0x8000) << bits;
  }
}

TEST(Half, OverflowIsInfinityUnlessSaturated) {
  EXPECT_EQ(half_from_float(65519.0f), 0x7BFF);
  EXPECT_EQ(half_from_float(65520.0f), 0x7C00);
  EXPECT_EQ(half_from_float_saturated(1e30f), 0x7BFF);
  EXPECT_EQ(half_from_float_saturated(-1e30f), 0xFBFF);
  EXPECT_TRUE(std::isinf(float_from_half(0xFC00)));
  EXPECT_TRUE(
      std::isnan(float_from_half(half_from_float(std::numeric_limits<float>::quiet_NaN()))));
}

TEST(BF16, RoundsToTheNearestEven) {
  EXPECT_EQ(bf16_from_float(1.0f), 0x3F80);
  EXPECT_EQ(bf16_from_float(1.0f + 0x1p-8f), 0x3F80);            // tie, even below
  EXPECT_EQ(bf16_from_float(1.0f + 0x1p-7f + 0x1p-8f), 0x3F82);  // tie, even above
  EXPECT_EQ(bf16_from_float(1.0f + 0x1p-8f + 0x1p-20f), 0x3F81);
  EXPECT_EQ(float_from_bf16(0xC049), -3.140625f);
  EXPECT_TRUE(
      std::isnan(float_from_bf16(bf16_from_float(std::numeric_limits<float>::quiet_NaN()))));
}

}  // namespace
}  // namespace fq::quant
