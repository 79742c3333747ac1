// The kernels of encoder_attention_avx_vnni.cc in the encoding of AVX-512 (extension.h). targets.cc
// chooses.
#if FRAMEQUILT_AVX2_VNNI  // processor.cmake
#define FRAMEQUILT_AVX2_DOT 2
#include "src/backend/cpu/encoder_attention_integer.cc"  // NOLINT(bugprone-suspicious-include)
#endif
