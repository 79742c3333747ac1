// Encoder attention with 8-bit queries and keys once more, for processors with AMX: its products
// run in matrix registers. targets.cc chooses.
#if FRAMEQUILT_AMX                                       // processor.cmake
#include "src/backend/cpu/encoder_attention_integer.cc"  // NOLINT(bugprone-suspicious-include)
#endif
