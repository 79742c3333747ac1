#include "src/quant/activations.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "src/quant/number.h"

namespace fq::quant {

QuantizedRow quantize_row(const float* x, int64_t n, model::ActivationFormat format,
                          int8_t* codes) {
  QuantizedRow row;
  float low = 0.0f, high = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
    finite &= std::isfinite(x[i]);
  }
  const int half = 1 << (format.bits - 1);
  if (!finite) {
    std::fill(codes, codes + n, int8_t{0});
    row.scale = std::numeric_limits<float>::quiet_NaN();
    return row;
  }
  float zero = 0.0f, least = static_cast<float>(-half), most = static_cast<float>(half - 1);
  if (format.symmetric) {
    row.scale = std::max(std::max(-low, high), 1e-5f) / most;
  } else {
    const float levels = static_cast<float>(2 * half - 1);
    row.scale = std::max(high - low, 1e-5f) / levels;
    zero = clamped(-std::nearbyint(low / row.scale), 0.0f, levels) - static_cast<float>(half);
  }
  row.zero = static_cast<int>(zero);
  for (int64_t i = 0; i < n; ++i) {
    codes[i] = static_cast<int8_t>(clamped(std::nearbyint(x[i] / row.scale) + zero, least, most));
  }
  return row;
}

void round_row(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = float_from_bf16(bf16_from_float(x[i]));
}

}  // namespace fq::quant
