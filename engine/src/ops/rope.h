// Cosines and sines of one position: computed once per position, shared by the reference and the
// kernels.
#pragma once

#include <cstdint>

#include "src/ops/ops.h"

namespace fq::ops {

// cos, sin [dims/2]. The angle is the float32 product of position and frequency, as the published
// models have it; its cosine and sine are those of that float, correctly rounded but for double
// rounding.
void rope_row(const RopeTable& table, int32_t position, float* cos, float* sin);

}  // namespace fq::ops
