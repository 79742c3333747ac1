// Encoder attention with 8-bit queries and keys once more, for 64-bit Arm processors with USDOT
// (FEAT_I8MM): scores take one instruction for 16 products. targets.cc chooses.
#ifdef __aarch64__
#define FRAMEQUILT_NEON_DOT 2
#include "src/backend/cpu/encoder_attention_integer.cc"  // NOLINT(bugprone-suspicious-include)
#endif
