// The kernels of linear_integer_avx_vnni.cc with the one instruction in the encoding of AVX-512: what
// is tested on processors with VNNI for AVX-512 only is then, but for that, what runs on the others.
// targets.cc chooses.
#if FRAMEQUILT_AVX2_VNNI  // processor.cmake
#define FRAMEQUILT_AVX2_DOT 2
#include "src/backend/cpu/linear_integer.cc"  // NOLINT(bugprone-suspicious-include)
#endif
