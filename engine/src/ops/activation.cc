// Scalar reference of the activations (formulas in ops/math.h). Owns nothing; any thread.
#include "src/ops/math.h"
#include "src/ops/ops.h"

namespace fq::ops {

void activation_reference(const ActivationArgs& args) {
  for (int64_t i = 0; i < args.count; ++i) {
    const float value = activate(args.kind, args.x[i]);
    args.y[i] = args.gate != nullptr ? value * args.gate[i] : value;
  }
}

}  // namespace fq::ops
