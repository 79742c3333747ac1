// Sums of the rows of a linear's weights: what the zeros of asymmetric inputs cost (ops/ops.h).
// Model directories hold them where a linear's inputs are asymmetric (engine/CONTRACT.md, 1.3);
// where they are missing they are computed here, with the same bits.
#pragma once

#include "src/quant/linear_weights.h"

namespace fq::quant {

// out[8] of one tile: for each row, over its groups in ascending order, in float64,
//   scale * (sum of codes - inputs * zero), with offset: scale * sum of codes + offset * inputs,
// rounded to float32 once. Every product is exact, so the order is all that there is to agree on.
// Affine weights only. Any thread.
void row_sums_of_tile(const LinearWeights& w, int tile, float* out);

}  // namespace fq::quant
