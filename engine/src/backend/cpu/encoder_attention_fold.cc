// Encoder attention with 8-bit queries and keys once more, for processors with AVX-512 VNNI that
// add beside multiplying: values are multiplied by Winograd's inner product. targets.cc chooses.
#if defined(__x86_64__)
#define FRAMEQUILT_FOLD 1
#include "src/backend/cpu/encoder_attention_integer.cc"  // NOLINT(bugprone-suspicious-include)
#endif
