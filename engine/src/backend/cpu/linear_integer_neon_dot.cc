// The integer linears once more, for 64-bit Arm processors with SDOT (FEAT_DotProd): targets.cc
// chooses.
#ifdef __aarch64__
#define FRAMEQUILT_NEON_DOT 1
#include "src/backend/cpu/linear_integer.cc"  // NOLINT(bugprone-suspicious-include)
#endif
