// Scalar reference of the linear op. Owns nothing; any thread.
#include <cmath>
#include <vector>

#include "src/ops/ops.h"

namespace fq::ops {

void linear_reference(const LinearArgs& args) {
  const quant::LinearWeights& w = *args.w;
  std::vector<float> weight(static_cast<size_t>(w.in));
  for (int o = 0; o < w.out; ++o) {
    quant::dequantize_row(w, o, weight.data());
    for (int64_t row = 0; row < args.rows; ++row) {
      const float* const x = args.x + row * args.x_stride;
      float sum = 0.0f;
      for (int i = 0; i < w.in; ++i) sum = std::fma(x[i], weight[static_cast<size_t>(i)], sum);
      if (w.bias != nullptr) sum += w.bias[o];
      float* const y = args.y + row * args.y_stride + o;
      *y = args.accumulate ? sum + *y : sum;
    }
  }
}

}  // namespace fq::ops
