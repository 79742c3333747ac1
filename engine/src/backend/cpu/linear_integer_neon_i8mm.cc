// The integer linears once more, for 64-bit Arm processors with USDOT (FEAT_I8MM): targets.cc
// chooses.
#ifdef __aarch64__
#define FRAMEQUILT_NEON_DOT 2
#include "src/backend/cpu/linear_integer.cc"  // NOLINT(bugprone-suspicious-include)
#endif
