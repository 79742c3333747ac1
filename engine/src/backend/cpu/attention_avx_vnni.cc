// Attention once more, for processors with AVX2 and AVX-VNNI: products with codes take one
// instruction instead of two. targets.cc chooses. As of linear_integer_avx_vnni.cc, a test reads
// the object.
#if FRAMEQUILT_AVX2_VNNI  // processor.cmake
#define FRAMEQUILT_AVX2_DOT 1
#include "src/backend/cpu/attention.cc"  // NOLINT(bugprone-suspicious-include)
#endif
