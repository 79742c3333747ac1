// Scalar references of the norms. Sums run in 16 interleaved partial sums (ops/math.h). Owns
// nothing; any thread.
#include <cmath>

#include "src/ops/math.h"
#include "src/ops/ops.h"

namespace fq::ops {

void rms_norm_reference(const NormArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    const float* const x = args.x + row * args.width;
    float* const y = args.y + row * args.width;
    float lanes[kSumLanes] = {};
    for (int64_t i = 0; i < args.width; ++i) {
      float& lane = lanes[i % kSumLanes];
      lane = std::fma(x[i], x[i], lane);
    }
    const float mean = add_lanes(lanes) / static_cast<float>(args.width);
    const float scale = 1.0f / std::sqrt(mean + args.eps);
    for (int64_t i = 0; i < args.width; ++i) y[i] = x[i] * scale * args.weight[i];
  }
}

void layer_norm_reference(const NormArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    const float* const x = args.x + row * args.width;
    float* const y = args.y + row * args.width;
    float sums[kSumLanes] = {};
    for (int64_t i = 0; i < args.width; ++i) sums[i % kSumLanes] += x[i];
    const float mean = add_lanes(sums) / static_cast<float>(args.width);
    float squares[kSumLanes] = {};
    for (int64_t i = 0; i < args.width; ++i) {
      const float d = x[i] - mean;
      float& lane = squares[i % kSumLanes];
      lane = std::fma(d, d, lane);
    }
    const float variance = add_lanes(squares) / static_cast<float>(args.width);
    const float scale = 1.0f / std::sqrt(variance + args.eps);
    for (int64_t i = 0; i < args.width; ++i) {
      const float scaled = (x[i] - mean) * scale * args.weight[i];
      y[i] = args.bias != nullptr ? scaled + args.bias[i] : scaled;
    }
  }
}

}  // namespace fq::ops
