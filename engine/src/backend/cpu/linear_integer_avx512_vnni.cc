// The kernels of linear_integer_avx_vnni.cc with the one instruction in the encoding of AVX-512:
// but for that, what processors with VNNI for AVX-512 only test is what the others run. targets.cc
// chooses.
#if FRAMEQUILT_AVX2_VNNI  // processor.cmake
#define FRAMEQUILT_AVX2_DOT 2
#include "src/backend/cpu/linear_integer.cc"  // NOLINT(bugprone-suspicious-include)
#endif
