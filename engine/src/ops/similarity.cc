// Scalar reference of the cosine between rows. Sums run in 16 interleaved partial sums
// (ops/math.h). Owns nothing; any thread.
#include <cmath>

#include "src/ops/math.h"
#include "src/ops/ops.h"

namespace fq::ops {

void similarity_reference(const SimilarityArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    if (args.prev[row] < 0) {
      args.out[row] = kNoSimilarity;
      continue;
    }
    const float* const a = args.x + row * args.stride;
    const float* const b = args.x + args.prev[row] * args.stride;
    float dot[kSumLanes] = {}, aa[kSumLanes] = {}, bb[kSumLanes] = {};
    for (int64_t i = 0; i < args.width; ++i) {
      const int64_t lane = i % kSumLanes;
      dot[lane] = std::fma(a[i], b[i], dot[lane]);
      aa[lane] = std::fma(a[i], a[i], aa[lane]);
      bb[lane] = std::fma(b[i], b[i], bb[lane]);
    }
    args.out[row] = cosine(add_lanes(dot), add_lanes(aa), add_lanes(bb));
  }
}

}  // namespace fq::ops
