// The integer linears once more, for processors with AVX2 and AVX-VNNI (4-way dot products of 256
// bits without AVX-512): targets.cc chooses. Nothing in this file may need more than these two:
// tests/engine/backend/avx_vnni_object.cmake reads what the compiler made of it.
#if FRAMEQUILT_AVX2_VNNI  // processor.cmake
#define FRAMEQUILT_AVX2_DOT 1
#include "src/backend/cpu/linear_integer.cc"  // NOLINT(bugprone-suspicious-include)
#endif
