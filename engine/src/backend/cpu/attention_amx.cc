// Attention once more, for processors with AMX: many rows are multiplied with codes in matrix
// registers. targets.cc chooses.
#if FRAMEQUILT_AMX                       // processor.cmake
#include "src/backend/cpu/attention.cc"  // NOLINT(bugprone-suspicious-include)
#endif
