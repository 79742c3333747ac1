// Scalar reference of the rotary embedding. Products are not fused: x cos and x sin are rounded on
// their own, as in the published models. Owns nothing; any thread.
#include "src/ops/rope.h"

#include <cmath>
#include <vector>

namespace fq::ops {

void rope_row(const RopeTable& table, int32_t position, float* cos, float* sin) {
  for (int i = 0; i < table.dims / 2; ++i) {
    const float angle = static_cast<float>(position) * table.inv_freq[i];
    cos[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
    sin[i] = static_cast<float>(std::sin(static_cast<double>(angle)));
  }
}

void rope_reference(const RopeArgs& args) {
  const int half = args.table.dims / 2;
  std::vector<float> cos(static_cast<size_t>(half)), sin(static_cast<size_t>(half));
  for (int64_t row = 0; row < args.rows; ++row) {
    rope_row(args.table, args.positions[row], cos.data(), sin.data());
    for (int head = 0; head < args.heads; ++head) {
      float* const x = args.x + row * args.stride + int64_t{head} * args.head_dim;
      for (int i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        const float c = cos[static_cast<size_t>(i)], s = sin[static_cast<size_t>(i)];
        x[i] = a * c - b * s;
        x[i + half] = b * c + a * s;
      }
    }
  }
}

}  // namespace fq::ops
