// Choice of a SIMD target.
#include "src/backend/cpu/targets.h"

namespace fq::backend::cpu {

std::vector<Target> simd_targets() { return {}; }

Kernels simd_kernels(const Target&) { return scalar_kernels(); }

}  // namespace fq::backend::cpu
