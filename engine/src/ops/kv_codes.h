// What attention over KV with codes multiplies them with, shared by the scalar reference and the
// kernels: queries and weights of values become integers of about 16 bits, so that their products
// with codes are exact sums. The rounding is 2^-16 of the largest of a row, far below that of the
// codes themselves. Pure functions, any thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "src/quant/kv_format.h"

namespace fq::ops {

// A number is code * step; a code is round(number * to_codes).
struct QueryScale {
  float to_codes, step;
};
using WeightScale = QueryScale;

inline constexpr float kSmallestLargest = 1e-30f;  // keeps the quotients finite
inline constexpr int kMostCode = 32767;
inline constexpr int kMostFactor = 255;  // |code - zero| of 8 bits

// The largest code of a query: the sum over a group has to fit in int32.
constexpr int query_most(int group) {
  return std::min(kMostCode, std::numeric_limits<int32_t>::max() / (kMostFactor * group));
}
static_assert(int64_t{quant::kPageTokens} * kMostCode * kMostFactor <=
              std::numeric_limits<int32_t>::max());

// Of a row of one head. A row that is not finite has codes 0, and scores that are NaN.
inline QueryScale query_scale(float largest, bool finite, int group) {
  if (!finite) return {0.0f, std::numeric_limits<float>::quiet_NaN()};
  const float most = static_cast<float>(query_most(group));
  const float bounded = std::max(largest, kSmallestLargest);
  return {most / bounded, bounded / most};
}

// Of the weights of the tokens of a block, none of them negative.
inline WeightScale weight_scale(float largest) {
  const float bounded = std::max(largest, kSmallestLargest);
  return {static_cast<float>(kMostCode) / bounded, bounded / static_cast<float>(kMostCode)};
}

}  // namespace fq::ops
