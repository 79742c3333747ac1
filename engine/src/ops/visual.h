// Ops between the vision tower and the decoder: patches to columns, pooling of the patch grid.
// Scalar; they are a negligible share of a frame's cost, so every backend uses these.
#pragma once

#include <cstdint>

#include "src/model/spec.h"

namespace fq::ops {

// image [channels, size, size] -> columns [grid*grid, channels*patch*patch], column order (channel,
// y, x): that of a flattened convolution weight.
void patchify(const float* image, int channels, int size, int patch, float* columns);

// Side of a pooled grid: bilinear ceil(grid/stride), average and max floor(grid/stride), none grid.
int pooled_side(int grid, model::PoolMode mode, int stride);
// in [grid, grid, width] -> out [side, side, width]. bilinear: half-pixel centres, no antialias.
void pool_grid(const float* in, int grid, int width, model::PoolMode mode, int stride, float* out);
// Bilinear resize of [in_h, in_w, width] to [out_h, out_w, width], half-pixel centres, no
// antialias.
void resize_bilinear(const float* in, int in_h, int in_w, int width, int out_h, int out_w,
                     float* out);

}  // namespace fq::ops
