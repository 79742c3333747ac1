// Patches to columns, pooling of the patch grid. Owns nothing; any thread.
#include "src/ops/visual.h"

#include <algorithm>

namespace fq::ops {
namespace {

// The two source lines of an output line and the weight of the second, half-pixel centres.
struct Tap {
  int first, second;
  float weight;
};

Tap tap_of(int out, int in_size, int out_size) {
  const float scale = static_cast<float>(in_size) / static_cast<float>(out_size);
  const float source = std::max(0.0f, (static_cast<float>(out) + 0.5f) * scale - 0.5f);
  const int first = std::min(static_cast<int>(source), in_size - 1);
  return {first, std::min(first + 1, in_size - 1), source - static_cast<float>(first)};
}

}  // namespace

void patchify(const float* image, int channels, int size, int patch, float* columns) {
  const int grid = size / patch;
  for (int gy = 0; gy < grid; ++gy) {
    for (int gx = 0; gx < grid; ++gx) {
      for (int channel = 0; channel < channels; ++channel) {
        for (int y = 0; y < patch; ++y) {
          const int64_t row = int64_t{channel} * size + gy * patch + y;
          columns = std::copy_n(image + row * size + gx * patch, patch, columns);
        }
      }
    }
  }
}

int pooled_side(int grid, model::PoolMode mode, int stride) {
  switch (mode) {
    case model::PoolMode::kNone:
      return grid;
    case model::PoolMode::kBilinear:
      return (grid + stride - 1) / stride;
    case model::PoolMode::kAverage:
    case model::PoolMode::kMax:
      return grid / stride;
  }
  return grid;
}

void resize_bilinear(const float* in, int in_h, int in_w, int width, int out_h, int out_w,
                     float* out) {
  for (int y = 0; y < out_h; ++y) {
    const Tap ty = tap_of(y, in_h, out_h);
    for (int x = 0; x < out_w; ++x) {
      const Tap tx = tap_of(x, in_w, out_w);
      const auto at = [&](int row, int col) { return in + (int64_t{row} * in_w + col) * width; };
      const float* const a = at(ty.first, tx.first);
      const float* const b = at(ty.first, tx.second);
      const float* const c = at(ty.second, tx.first);
      const float* const d = at(ty.second, tx.second);
      for (int i = 0; i < width; ++i) {
        const float above = (1.0f - tx.weight) * a[i] + tx.weight * b[i];
        const float below = (1.0f - tx.weight) * c[i] + tx.weight * d[i];
        *out++ = (1.0f - ty.weight) * above + ty.weight * below;
      }
    }
  }
}

void pool_grid(const float* in, int grid, int width, model::PoolMode mode, int stride, float* out) {
  const int side = pooled_side(grid, mode, stride);
  if (mode == model::PoolMode::kNone) {
    std::copy_n(in, int64_t{grid} * grid * width, out);
    return;
  }
  if (mode == model::PoolMode::kBilinear) {
    resize_bilinear(in, grid, grid, width, side, side, out);
    return;
  }
  const bool average = mode == model::PoolMode::kAverage;
  for (int y = 0; y < side; ++y) {
    for (int x = 0; x < side; ++x, out += width) {
      const float* const corner = in + (int64_t{y} * stride * grid + x * stride) * width;
      std::copy_n(corner, width, out);
      for (int cell = 1; cell < stride * stride; ++cell) {
        const float* const other = corner + (int64_t{cell / stride} * grid + cell % stride) * width;
        for (int i = 0; i < width; ++i)
          out[i] = average ? out[i] + other[i] : std::max(out[i], other[i]);
      }
      for (int i = 0; average && i < width; ++i) out[i] /= static_cast<float>(stride * stride);
    }
  }
}

}  // namespace fq::ops
